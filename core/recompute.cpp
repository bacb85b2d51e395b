// Recomputation: checkpoint() keeps what a second run of a function needs instead of what its rules save, remade() what
// makes one tensor again.
#include <optional>
#include <utility>

#include "core/autograd.h"
#include "core/autograd_node.h"

namespace weft::autograd {
namespace {

thread_local bool second_run = false;

class SecondRun {
 public:
  SecondRun() : previous_(std::exchange(second_run, true)) {}
  ~SecondRun() { second_run = previous_; }
  SecondRun(const SecondRun&) = delete;
  SecondRun& operator=(const SecondRun&) = delete;

 private:
  bool previous_;
};

/// A tensor that may have been handed to the saved-tensor hooks of an enclosing checkpoint, which then recomputes it.
struct Kept {
  Tensor tensor;
  std::function<Tensor()> unpacker;
  uint64_t version = 0;
  bool requires_grad = false;

  explicit Kept(const Tensor& input) : version(input.storage()->version()), requires_grad(input.requires_grad()) {
    const auto* pack = grad_mode() ? SavedTensorHooks::current() : nullptr;
    if (pack != nullptr)
      unpacker = (*pack)(input.detach());
    else
      tensor = input.detach();
  }
};

/// What a checkpointed call keeps instead of the tensors that its rules saved.
struct Frame {
  /// What the first run saved, but for its values.
  struct Saved {
    std::weak_ptr<Storage> storage;
    uint64_t version;
    Shape shape;
    DType dtype;
  };
  std::function<std::vector<Tensor>(const std::vector<Tensor>&)> function;
  std::vector<Kept> inputs;
  std::vector<Saved> saved;
  std::vector<Tensor> values;  // the same, from a second run

  void recompute() {
    std::vector<Tensor> again;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Kept& input = inputs[i];
      if (!input.unpacker && input.tensor.storage()->version() != input.version) {
        fail(ErrorKind::kState, "checkpoint", "input ", i, " (", input.tensor.describe(), ") was changed in place by [",
             input.tensor.storage()->last_change(), "] before the backward pass could compute with it again");
      }
      again.push_back((input.unpacker ? input.unpacker() : input.tensor).detach());
      if (input.requires_grad) again.back().requires_grad_();
    }
    std::vector<Tensor> second;
    {
      const GradMode mode(true);
      const SecondRun run;
      const SavedTensorHooks hooks([&second](const Tensor& tensor) {
        second.push_back(tensor);
        return [] { return Tensor(); };
      });
      function(again);
    }
    if (second.size() != saved.size()) {
      fail(ErrorKind::kState, "checkpoint", "the function saved ", saved.size(), " tensors the first time and ",
           second.size(), " the second: it is not a pure function of its inputs");
    }
    for (size_t i = 0; i < saved.size(); ++i) check(i, second[i]);
    values = std::move(second);
  }

  void check(size_t i, const Tensor& tensor) const {
    const Saved& before = saved[i];
    if (!(tensor.shape() == before.shape) || tensor.dtype() != before.dtype) {
      fail(ErrorKind::kState, "checkpoint", "the function saved ", before.dtype, ' ', before.shape,
           " the first time and ", tensor.describe(), " the second: it is not a pure function of its inputs");
    }
    // A tensor that both runs saved was made before them: a parameter.
    if (before.storage.lock() == tensor.storage() && before.version != tensor.storage()->version()) {
      fail(ErrorKind::kState, "checkpoint", "a tensor (", tensor.describe(),
           ") that the function uses was changed in place by [", tensor.storage()->last_change(),
           "] before the backward pass could compute with it again");
    }
  }

  Tensor value(size_t i) {
    // Handed out once, so that memory goes back as the backward pass proceeds; a retained graph computes again.
    if (values.empty() || !values[i].defined()) recompute();
    return std::exchange(values[i], Tensor());
  }
};

}  // namespace

bool recomputing() { return second_run; }

std::vector<Tensor> checkpoint(std::function<std::vector<Tensor>(const std::vector<Tensor>&)> function,
                               const std::vector<Tensor>& inputs) {
  if (!grad_mode()) return function(inputs);
  auto frame = std::make_shared<Frame>();
  frame->function = std::move(function);
  for (const Tensor& input : inputs) frame->inputs.emplace_back(input);
  const SavedTensorHooks hooks([frame](const Tensor& tensor) {
    frame->saved.push_back({tensor.storage(), tensor.storage()->version(), tensor.shape(), tensor.dtype()});
    return [frame, i = frame->saved.size() - 1] { return frame->value(i); };
  });
  return frame->function(inputs);
}

Recipe::Recipe(const char* op, const Tensor& output, Function function, const std::vector<Tensor>& inputs)
    : op_(op),
      version_(output.storage()->version()),
      shape_(output.shape()),
      dtype_(output.dtype()),
      function_(std::move(function)) {
  inputs_.reserve(inputs.size());
  for (const Tensor& input : inputs)
    inputs_.emplace_back(input.defined() ? input.detach() : input, std::vector<Tensor>());
}

Tensor Recipe::value() {
  if (!value_.defined()) {
    std::vector<Tensor> inputs;
    for (const SavedTensor& input : inputs_) inputs.push_back(input.value(op_));
    const NoGrad no_grad;
    Tensor made = function_(inputs);
    if (!(made.shape() == shape_) || made.dtype() != dtype_ || !made.is_contiguous() || made.offset() != 0) {
      fail(ErrorKind::kState, op_, "the result was ", dtype_, ' ', shape_, " the first time and ", made.describe(),
           made.is_contiguous() ? "" : ", not row-major,",
           " when it was made again: its recipe is not a pure function of its inputs");
    }
    value_ = std::move(made);
  }
  if (++served_ < users_) return value_;
  served_ = 0;
  return std::exchange(value_, Tensor());
}

void remade(const char* op, const Tensor& output, std::function<Tensor(const std::vector<Tensor>&)> function,
            const std::vector<Tensor>& inputs) {
  if (!grad_mode()) return;
  if (!output.is_contiguous() || output.offset() != 0) {
    fail(ErrorKind::kState, op, "only a whole row-major tensor can be made again, got ", output.describe(),
         " at offset ", output.offset());
  }
  output.storage()->set_recipe(std::make_shared<Recipe>(op, output, std::move(function), inputs));
}

}  // namespace weft::autograd
