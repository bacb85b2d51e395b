#include "core/tensor.h"

#include <ostream>
#include <utility>

#include "core/autograd.h"
#include "core/autograd_node.h"

namespace weft {

using autograd::Meta;

// ---- storage ----

Storage::Storage(Device device, int64_t bytes, Allocator& allocator)
    : device_(device),
      bytes_(bytes),
      allocator_(&allocator),
      category_(MemoryScope::current()),
      data_(allocator_->allocate(static_cast<size_t>(bytes), category_)) {}

Storage::Storage(Device device, int64_t bytes, std::string what)
    : device_(device),
      bytes_(bytes),
      allocator_(nullptr),
      category_(MemoryScope::current()),
      place_(Place::released),
      what_(std::move(what)) {}

Storage::~Storage() {
  if (owner_ == nullptr && data_ != nullptr) allocator_->free(data_);
}

void Storage::recount(MemoryCategory category) {
  category_ = category;
  if (owner_ != nullptr)
    owner_->recount(category);
  else if (data_ != nullptr)
    allocator_->recount(data_, category);
}

void Storage::release(std::string what) {
  if (owner_ == nullptr && data_ != nullptr) allocator_->free(data_);
  owner_ = nullptr;
  data_ = nullptr;
  place_ = Place::released;
  what_ = std::move(what);
  deferred_ = nullptr;
}

void Storage::lend(std::shared_ptr<Storage> owner, int64_t offset) {
  if (!is_released())
    fail(ErrorKind::kState, "storage", "memory can be lent only where it was released; these ", grouped(bytes_),
         " bytes have theirs");
  if (owner->device_ != device_ || offset < 0 || offset > owner->bytes_ - bytes_) {
    fail(ErrorKind::kIndex, "storage", what_, " needs ", grouped(bytes_), " bytes on ", device_, "; what is lent has ",
         grouped(owner->bytes_), " on ", owner->device_, " and begins at ", grouped(offset));
  }
  void* begin = owner->data();
  data_ = begin == nullptr ? nullptr : static_cast<char*>(begin) + offset;
  owner_ = std::move(owner);
  place_ = Place::here;
}

void Storage::defer(std::function<void()> complete) {
  if (is_released())
    fail(ErrorKind::kState, "storage", what_, " is released: there is no memory for elements that are on their way");
  if (deferred_ == nullptr) deferred_ = std::make_unique<Deferred>();
  const std::lock_guard lock(deferred_->mutex);
  deferred_->completions.push_back(std::move(complete));
  place_.store(Place::deferred, std::memory_order_release);
}

void Storage::reach() const {
  if (is_released()) {
    fail(ErrorKind::kState, "storage", what_, " is released: its ", grouped(bytes_),
         " bytes are not in memory now. Hint: reach for them only between getting the memory and giving it back");
  }
  const std::lock_guard lock(deferred_->mutex);
  std::vector<std::function<void()>>& completions = deferred_->completions;
  while (!completions.empty()) {
    completions.front()();
    completions.erase(completions.begin());
  }
  place_.store(Place::here, std::memory_order_release);
}

// ---- making ----

namespace detail {

void check_count(size_t got, const Shape& shape) {
  if (static_cast<int64_t>(got) != numel(shape, "Tensor::from")) {
    fail(ErrorKind::kShape, "Tensor::from", got, " values do not fill shape ", shape, ", which has ", numel(shape),
         " elements");
  }
}

void check_dtype(DType wanted, DType got) {
  if (wanted != got)
    fail(ErrorKind::kDType, "Tensor::data", "the tensor is ", got, ", asked for as ", wanted,
         ". Hint: cast with .to()");
}

}  // namespace detail

Tensor::Impl& Tensor::get() const {
  if (impl_ == nullptr)
    fail(ErrorKind::kState, "tensor", "this tensor is undefined (default-constructed or moved from)");
  return *impl_;
}

Tensor Tensor::empty(const Shape& shape, DType dtype, Device device) {
  return allocated(shape, dtype, device, allocator(device));
}

Tensor Tensor::pinned(const Shape& shape, DType dtype, Device device) {
  return allocated(shape, dtype, Device::cpu(), pinned_allocator(device));
}

Tensor Tensor::without_memory(const Shape& shape, DType dtype, Device device, std::string what) {
  return over(shape, dtype, [&](int64_t bytes) { return std::make_shared<Storage>(device, bytes, std::move(what)); });
}

Tensor Tensor::allocated(const Shape& shape, DType dtype, Device device, Allocator& allocator) {
  return over(shape, dtype, [&](int64_t bytes) { return std::make_shared<Storage>(device, bytes, allocator); });
}

Tensor Tensor::over(const Shape& shape, DType dtype, const std::function<std::shared_ptr<Storage>(int64_t)>& storage) {
  const int64_t count = weft::numel(shape, "Tensor::empty");
  int64_t bytes = 0;
  if (__builtin_mul_overflow(count, size_of(dtype), &bytes)) {
    fail(ErrorKind::kShape, "Tensor::empty", dtype, " ", shape, " has more bytes than 64 bits can count");
  }
  Tensor out;
  out.impl_ = std::make_shared<Impl>();
  out.impl_->storage = storage(bytes);
  out.impl_->shape = shape;
  out.impl_->strides = contiguous_strides(shape);
  out.impl_->numel = count;
  out.impl_->dtype = dtype;
  return out;
}

Tensor Tensor::full(const Shape& shape, double value, DType dtype, Device device) {
  Tensor out = empty(shape, dtype, device);
  if (!DryRun::active()) backend(device).fill(out.view(), value);
  return out;
}

Tensor Tensor::arange(int64_t n, DType dtype, Device device) {
  if (n < 0) fail(ErrorKind::kValue, "arange", "n must not be negative, got ", n);
  const Tensor out = empty({n}, DType::i64);
  if (!DryRun::active()) {
    int64_t* values = out.data<int64_t>();
    for (int64_t i = 0; i < n; ++i) values[i] = i;
  }
  return out.to(dtype).to(device);
}

Tensor Tensor::make_view(const Tensor& base, const Shape& shape, const Strides& strides, int64_t offset) {
  Tensor out;
  out.impl_ = std::make_shared<Impl>();
  out.impl_->storage = base.storage();
  out.impl_->shape = shape;
  out.impl_->strides = strides;
  out.impl_->offset = offset;
  out.impl_->numel = weft::numel(shape);
  out.impl_->dtype = base.dtype();
  return out;
}

// ---- what it is ----

int64_t Tensor::size(int64_t dim) const { return shape()[normalize_dim(dim, rank(), "Tensor::size")]; }

void* Tensor::raw() const {
  const Impl& impl = get();
  void* const data = impl.storage->data();
  if (data == nullptr) return nullptr;  // no bytes, whatever the offset of an empty view
  return static_cast<char*>(data) + impl.offset * size_of(impl.dtype);
}

std::string Tensor::describe() const { return defined() ? concat(dtype(), ' ', shape()) : "undefined"; }

// ---- reading ----

template <class T>
std::vector<T> Tensor::to_vector() const {
  if (DryRun::active()) fail(ErrorKind::kState, "Tensor::to_vector", "there are no values to read in a dry run");
  const autograd::NoGrad no_grad;
  const Tensor source = to(DTypeOf<T>::value).contiguous();
  std::vector<T> values(static_cast<size_t>(numel()));
  if (!values.empty()) backend(device()).to_host(values.data(), source.raw(), values.size() * sizeof(T));
  return values;
}
template std::vector<float> Tensor::to_vector() const;
template std::vector<double> Tensor::to_vector() const;
template std::vector<int32_t> Tensor::to_vector() const;
template std::vector<int64_t> Tensor::to_vector() const;
template std::vector<uint8_t> Tensor::to_vector() const;

double Tensor::item() const {
  if (numel() != 1) fail(ErrorKind::kShape, "Tensor::item", "needs exactly one element, got ", describe());
  return to_vector<double>()[0];
}

std::ostream& operator<<(std::ostream& out, const Tensor& tensor) {
  out << tensor.describe();
  if (!tensor.defined() || DryRun::active()) return out;
  constexpr int64_t kShown = 8;
  const autograd::NoGrad no_grad;
  const Tensor flat = tensor.reshape({-1});
  const std::vector<double> values = flat.slice(0, 0, std::min(kShown, flat.numel())).to_vector<double>();
  out << " {";
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  return out << (flat.numel() > kShown ? ", ...}" : "}");
}

// ---- in place ----

void Tensor::begin_change(const char* op) const {
  if (autograd::grad_mode() && requires_grad()) {
    fail(ErrorKind::kState, op, "would change in place a tensor (", describe(),
         ") that takes part in a graph. Hint: change it under NoGrad, ",
         "change detach(), or use the form that answers with a new tensor");
  }
  for (int d = 0; d < rank(); ++d) {
    if (shape()[d] > 1 && strides()[d] == 0) {
      fail(ErrorKind::kState, op, "would change in place a tensor (", describe(), ") whose dimension ", d,
           " is expanded: its elements share memory. Hint: change a clone()");
    }
  }
  get().storage->bump(op);
}

Tensor& Tensor::fill_(double value) {
  begin_change("fill_");
  if (!DryRun::active()) backend(device()).fill(view(), value);
  return *this;
}

Tensor& Tensor::copy_(const Tensor& source) {
  if (!(source.shape() == shape())) {
    fail(ErrorKind::kShape, "copy_", "the source is ", source.describe(), ", the target ", describe(),
         "; shapes must be equal in place. ", "Hint: expand() the source");
  }
  if (autograd::grad_mode() && source.requires_grad()) {
    fail(ErrorKind::kState, "copy_", "the source (", source.describe(),
         ") takes part in a graph, and a copy in place records no gradient. Hint: copy under NoGrad, or copy "
         "source.detach()");
  }
  begin_change("copy_");
  if (DryRun::active() || numel() == 0) return *this;
  if (source.storage() == storage()) {
    if (source.offset() == offset() && source.strides() == strides()) return *this;
    const autograd::NoGrad no_grad;  // the two may overlap: read everything before anything is written
    backend(device()).copy(view(), source.clone().view());
    return *this;
  }
  if (source.device() == device()) {
    backend(device()).copy(view(), source.view());
    return *this;
  }
  const Tensor there = source.detach().to(dtype()).contiguous();
  const auto bytes = static_cast<size_t>(numel() * size_of(dtype()));
  Tensor host = there;
  if (there.device().kind != DeviceKind::cpu) {
    host = empty(shape(), dtype());
    backend(there.device()).to_host(host.raw(), there.raw(), bytes);
  }
  if (device().kind == DeviceKind::cpu) {
    backend(device()).copy(view(), host.view());
  } else {
    Tensor staged = is_contiguous() ? *this : empty(shape(), dtype(), device());
    backend(device()).to_device(staged.raw(), host.raw(), bytes);
    if (!staged.is_same(*this)) backend(device()).copy(view(), staged.view());
  }
  return *this;
}

// ---- autograd ----

bool Tensor::requires_grad() const { return get().meta != nullptr && get().meta->requires_grad; }

bool Tensor::is_leaf() const { return get().meta == nullptr || get().meta->node == nullptr; }

Tensor& Tensor::requires_grad_(bool value) {
  if (!is_leaf()) {
    fail(ErrorKind::kState, "requires_grad_",
         "only a leaf can be told whether it requires a gradient; this tensor was computed by [", get().meta->node->op,
         "]. Hint: detach() it first");
  }
  if (value && !is_float(dtype()))
    fail(ErrorKind::kDType, "requires_grad_", "only float tensors have gradients, got ", describe());
  if (get().meta == nullptr) get().meta = std::make_shared<Meta>();
  get().meta->requires_grad = value;
  return *this;
}

Tensor Tensor::grad() const { return get().meta == nullptr ? Tensor() : get().meta->grad; }

void Tensor::set_grad(Tensor grad) const {
  if (grad.defined() && (!(grad.shape() == shape()) || grad.dtype() != dtype() || grad.device() != device())) {
    fail(ErrorKind::kShape, "set_grad", "the gradient is ", grad.describe(), " on ", grad.device(), ", the tensor ",
         describe(), " on ", device());
  }
  if (get().meta == nullptr) get().meta = std::make_shared<Meta>();
  get().meta->grad = std::move(grad);
}

void Tensor::clear_grad() const {
  if (get().meta != nullptr) get().meta->grad = Tensor();
}

void Tensor::retain_grad() const {
  if (!requires_grad())
    fail(ErrorKind::kState, "retain_grad", "this tensor (", describe(), ") does not require a gradient");
  if (is_leaf() || std::exchange(get().meta->retains_grad, true)) return;
  register_hook([meta = std::weak_ptr<Meta>(get().meta)](const Tensor& gradient) {
    if (const auto alive = meta.lock()) {
      autograd::accumulate(alive->grad, gradient, gradient.shape(), gradient.dtype(), gradient.device(), "retain_grad");
    }
    return Tensor();
  });
}

Tensor Tensor::detach() const { return make_view(*this, shape(), strides(), offset()); }

void Tensor::backward(const Tensor& gradient, bool retain_graph) const {
  autograd::backward({*this}, {gradient}, retain_graph);
}

void Tensor::register_hook(std::function<Tensor(const Tensor&)> hook) const {
  if (!requires_grad())
    fail(ErrorKind::kState, "register_hook", "this tensor (", describe(), ") does not require a gradient");
  Meta& meta = *get().meta;
  if (meta.node == nullptr)
    meta.hooks.push_back(std::move(hook));
  else
    meta.node->hooks.emplace_back(meta.output, std::move(hook));
}

bool Tensor::has_hooks() const {
  const auto& meta = get().meta;
  return meta != nullptr && !(meta->hooks.empty() && meta->grad_ready_hooks.empty());
}

void Tensor::register_grad_ready_hook(std::function<void(const Tensor&)> hook) const {
  if (!requires_grad() || !is_leaf()) {
    fail(ErrorKind::kState, "register_grad_ready_hook", "only a leaf that requires a gradient adds one up; got ",
         describe());
  }
  get().meta->grad_ready_hooks.push_back(std::move(hook));
}

}  // namespace weft
