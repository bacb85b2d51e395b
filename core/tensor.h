#pragma once
#include <atomic>
#include <functional>
#include <iosfwd>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/memory.h"

namespace weft {

class Tensor;
namespace autograd {
class Node;
class Recipe;
struct Meta;
}  // namespace autograd

/// Bytes on a device, shared by a tensor and its views, with a counter of in-place changes.
class Storage {
 public:
  /// @param allocator  where the bytes come from: the device's, or that of a device which may read them from afar
  Storage(Device device, int64_t bytes, Allocator& allocator);
  /// Without memory, as after release(what).
  Storage(Device device, int64_t bytes, std::string what);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  /// Null if it has no bytes. Waits for elements that are on their way (defer()). @throws Error kState, naming what it
  /// is, while it is released.
  void* data() const {
    if (place_.load(std::memory_order_acquire) != Place::here) reach();
    return data_;
  }
  int64_t bytes() const { return bytes_; }
  Device device() const { return device_; }
  uint64_t version() const { return version_; }
  const char* last_change() const { return last_change_; }
  /// Notes an in-place change by `op` (a string literal).
  void bump(const char* op) { ++version_, last_change_ = op; }
  /// Counts the bytes under another category from now on.
  void recount(MemoryCategory category);
  MemoryCategory category() const { return category_; }

  /// Gives the memory back while tensors (a parameter's handles, and what rules saved of it) still refer to it. Until
  /// lend() gives it memory again, reaching for its elements is an error that names `what` ("parameter \"wte\"").
  void release(std::string what);
  /// From now on the memory is that of `owner` from byte `offset` on, which lives until release(). That the elements
  /// are those from before is the caller's promise: this is no change. @throws Error kState unless it is released;
  /// kIndex if the owner has too few bytes or is on another device.
  void lend(std::shared_ptr<Storage> owner, int64_t offset);
  bool is_released() const { return place_ == Place::released; }

  /// From now on some elements are on their way: `complete` waits for them and puts them in their place, by addresses
  /// that it took before, and whoever reaches for any element calls it first, on whatever thread. If it throws, so does
  /// data(), now and then again. Several run in the order of these calls; release() drops them. That elements change is
  /// the caller's to note, here and now (bump()).
  void defer(std::function<void()> complete);
  /// Whether some elements are on their way.
  bool is_deferred() const { return place_ == Place::deferred; }

  /// How a rule that saves this is to have it again (autograd::remade); null: by keeping it.
  const std::shared_ptr<autograd::Recipe>& recipe() const { return recipe_; }
  void set_recipe(std::shared_ptr<autograd::Recipe> recipe) { recipe_ = std::move(recipe); }

 private:
  /// Where the elements are.
  enum class Place : uint8_t { here, deferred, released };
  struct Deferred {
    std::mutex mutex;
    std::vector<std::function<void()>> completions;
  };
  void reach() const;

  Device device_;
  int64_t bytes_;
  Allocator* allocator_;  // null: without memory of its own from the start
  MemoryCategory category_;
  void* data_ = nullptr;
  mutable std::atomic<Place> place_ = Place::here;
  std::unique_ptr<Deferred> deferred_;  // once there were any
  std::string what_;                    // it is, once it was released
  std::shared_ptr<Storage> owner_;      // of the memory, where it was lent
  std::shared_ptr<autograd::Recipe> recipe_;
  uint64_t version_ = 0;
  const char* last_change_ = "nothing";
};

/// A handle on a strided array: storage, shape, strides, offset, dtype, and its place in the autograd graph. Copying a
/// Tensor copies the handle; views share storage. Up to 6 dimensions; sizes and strides count elements.
class Tensor {
 public:
  Tensor() = default;  ///< undefined: defined() is false
  bool defined() const { return impl_ != nullptr; }

  // ---- making ----
  /// Contiguous, contents unspecified. Counted under MemoryScope's category.
  static Tensor empty(const Shape& shape, DType dtype = DType::f32, Device device = Device::cpu());
  /// The same on the CPU, in memory that stays where it is (page-locked), so that `device` copies from and to it while
  /// the host goes on (Backend::copy_async). Host code may use it when no copy of it is under way. Counted by
  /// pinned_allocator(device).
  static Tensor pinned(const Shape& shape, DType dtype, Device device);
  /// A tensor whose storage is released (Storage::release) and waits for memory.
  static Tensor without_memory(const Shape& shape, DType dtype, Device device, std::string what);
  static Tensor full(const Shape& shape, double value, DType dtype = DType::f32, Device device = Device::cpu());
  static Tensor zeros(const Shape& shape, DType dtype = DType::f32, Device device = Device::cpu()) {
    return full(shape, 0, dtype, device);
  }
  static Tensor ones(const Shape& shape, DType dtype = DType::f32, Device device = Device::cpu()) {
    return full(shape, 1, dtype, device);
  }
  static Tensor empty_like(const Tensor& other) { return empty(other.shape(), other.dtype(), other.device()); }
  static Tensor zeros_like(const Tensor& other) { return zeros(other.shape(), other.dtype(), other.device()); }
  /// [0, 1, ..., n-1], cast to dtype.
  static Tensor arange(int64_t n, DType dtype = DType::i64, Device device = Device::cpu());
  /// Copies host values of the tensor's own type. @throws Error kShape if their number is not that of the shape.
  template <class T>
  static Tensor from(std::span<const T> values, const Shape& shape, Device device = Device::cpu());
  template <class T>
  static Tensor from(const std::vector<T>& values, const Shape& shape, Device device = Device::cpu()) {
    return from(std::span<const T>(values), shape, device);
  }

  // ---- what it is ----
  const Shape& shape() const { return get().shape; }
  const Strides& strides() const { return get().strides; }
  int rank() const { return shape().rank(); }
  /// Size of a dimension; negative counts from the end.
  int64_t size(int64_t dim) const;
  int64_t numel() const { return get().numel; }
  int64_t offset() const { return get().offset; }
  DType dtype() const { return get().dtype; }
  Device device() const { return get().storage->device(); }
  bool is_contiguous() const { return weft::is_contiguous(shape(), strides()); }
  const std::shared_ptr<Storage>& storage() const { return get().storage; }
  /// Address of the first element.
  void* raw() const;
  /// The same, typed. @throws Error kDType if T is not the dtype.
  template <class T>
  T* data() const;
  StridedView view() const { return {raw(), shape(), strides(), dtype()}; }
  /// "f32 [8, 1024]", for messages.
  std::string describe() const;

  // ---- reading ----
  /// The one element as a number. @throws Error kShape if there is not exactly one.
  double item() const;
  /// All elements in row-major order, cast to T.
  template <class T>
  std::vector<T> to_vector() const;

  // ---- views: share storage, differentiable ----
  /// Row-major order kept; one size may be -1. A view where strides allow it, else a copy.
  Tensor reshape(const Shape& shape) const;
  Tensor transpose(int64_t dim0, int64_t dim1) const;
  /// Dimension i of the result is dimension order[i] of this.
  Tensor permute(const Dims& order) const;
  /// Elements start, start+step, ... before stop along dim; negative indices count from the end; step >= 1.
  Tensor slice(int64_t dim, int64_t start, int64_t stop, int64_t step = 1) const;
  Tensor narrow(int64_t dim, int64_t start, int64_t length) const;
  /// Element `index` along dim; the dimension goes away.
  Tensor select(int64_t dim, int64_t index) const;
  /// Repeats dimensions of size 1 without copying; new dimensions lead.
  Tensor expand(const Shape& shape) const;
  Tensor squeeze(int64_t dim) const;
  Tensor unsqueeze(int64_t dim) const;
  /// Pieces of `size` along dim; the last may be smaller.
  std::vector<Tensor> split(int64_t size, int64_t dim = 0) const;

  // ---- copies: differentiable ----
  /// This if contiguous, else a row-major copy.
  Tensor contiguous() const;
  Tensor clone() const;
  Tensor to(DType dtype) const;
  Tensor to(Device device) const;

  // ---- in place ----
  // Refused, in grad mode, where a gradient would get lost: on a tensor that requires a gradient, or from one. Refused
  // on an expanded tensor, whose elements share memory. Each counts as a change, so that a backward pass that needs the
  // old values fails and names this change.
  Tensor& fill_(double value);
  Tensor& zero_() { return fill_(0); }
  /// Casts; shapes must be equal: no implicit broadcasting in place. The two may overlap.
  Tensor& copy_(const Tensor& source);
  /// Checks the rule above and counts a change by `op` (a string literal): for functions that write into a tensor.
  void begin_change(const char* op) const;

  // ---- autograd ----
  bool requires_grad() const;
  /// Makes this a leaf whose gradient is wanted. @throws Error kDType unless float; kState if it is no leaf.
  Tensor& requires_grad_(bool value = true);
  bool is_leaf() const;
  /// The gradient that backward passes have added up; undefined if there is none.
  Tensor grad() const;
  void set_grad(Tensor grad) const;
  void clear_grad() const;
  /// Keeps the gradient of a tensor that is no leaf, so that grad() has it after backward; several passes add up.
  void retain_grad() const;
  /// The same values outside the graph; shares storage.
  Tensor detach() const;
  /// Gradients of this (one element, or with `gradient` of the same shape) with respect to every leaf, added to grad().
  void backward(const Tensor& gradient = {}, bool retain_graph = false) const;
  /// Calls hook(gradient) when the gradient of this tensor is complete; a defined result replaces it.
  void register_hook(std::function<Tensor(const Tensor&)> hook) const;
  /// Leaves only: calls hook(leaf) when a backward pass has added its whole contribution to grad().
  void register_grad_ready_hook(std::function<void(const Tensor&)> hook) const;

  /// Whether one of the two is registered on this leaf.
  bool has_hooks() const;

  /// Whether both are handles on the very same tensor.
  bool is_same(const Tensor& other) const { return impl_ == other.impl_; }
  /// Whether no other handle and no view shares the memory.
  bool is_sole_owner() const { return impl_.use_count() == 1 && impl_->storage.use_count() == 1; }

  struct Impl {
    std::shared_ptr<Storage> storage;
    Shape shape;
    Strides strides;
    int64_t offset = 0;
    int64_t numel = 0;
    DType dtype = DType::f32;
    std::shared_ptr<autograd::Meta> meta;  // null: outside any graph
  };
  /// A view of `storage`; bounds are the caller's promise. No autograd: for functions that record their own rule.
  static Tensor make_view(const Tensor& base, const Shape& shape, const Strides& strides, int64_t offset);
  const std::shared_ptr<autograd::Meta>& autograd_meta() const { return get().meta; }
  void set_autograd_meta(std::shared_ptr<autograd::Meta> meta) const { get().meta = std::move(meta); }

 private:
  static Tensor allocated(const Shape& shape, DType dtype, Device device, Allocator& allocator);
  static Tensor over(const Shape& shape, DType dtype, const std::function<std::shared_ptr<Storage>(int64_t)>& storage);
  Impl& get() const;
  std::shared_ptr<Impl> impl_;
};

/// Tensors joined along dim; other sizes and dtypes must be equal. Differentiable.
Tensor cat(const std::vector<Tensor>& tensors, int64_t dim = 0);

/// "f32 [2, 3] {1, 2, ...}": shape and the first values.
std::ostream& operator<<(std::ostream& out, const Tensor& tensor);

namespace detail {
void check_count(size_t got, const Shape& shape);
void check_dtype(DType wanted, DType got);
}  // namespace detail

template <class T>
T* Tensor::data() const {
  detail::check_dtype(DTypeOf<std::remove_const_t<T>>::value, dtype());
  return static_cast<T*>(raw());
}

template <class T>
Tensor Tensor::from(std::span<const T> values, const Shape& shape, Device device) {
  detail::check_count(values.size(), shape);
  Tensor out = empty(shape, DTypeOf<T>::value, device);
  if (!values.empty() && !DryRun::active()) backend(device).to_device(out.raw(), values.data(), values.size_bytes());
  return out;
}

}  // namespace weft
