#pragma once
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "core/tensor.h"

// Reverse-mode differentiation on a tape. A function that computes `outputs` from `inputs` calls record() with its
// backward rule; backward() then walks the tape from the loss in the reverse order of recording, so that the order in
// which gradients are added is a function of the program alone.

namespace weft::autograd {

class Node;
class Recipe;

/// Where a gradient goes: an input of the node that made the tensor.
struct Edge {
  std::shared_ptr<Node> node;
  int index = 0;
};

/// A tensor kept for the backward pass, with the version its storage had.
class SavedTensor {
 public:
  SavedTensor() = default;
  SavedTensor(const Tensor& tensor, const std::vector<Tensor>& outputs);

  /// The tensor as it was saved, with its place in the graph if grad mode is on. @throws Error kState, naming `node`'s
  /// op and the one that changed it, if it was changed in place since.
  Tensor unpack(const std::shared_ptr<Node>& node) const;
  /// The same without a place in the graph; `op` saved it.
  Tensor value(const char* op) const;

 private:
  Tensor tensor_;
  uint64_t version_ = 0;
  std::shared_ptr<Recipe> recipe_;  // set where the tensor is made again
  Shape shape_;                     // and what part of it was saved
  Strides strides_;
  int64_t offset_ = 0;
  std::shared_ptr<Meta> meta_;        // graph position of an input; null if it has none
  int output_ = -1;                   // or its number among the node's own outputs
  std::function<Tensor()> unpacker_;  // set where SavedTensorHooks took the tensor away
};

/// What a backward rule sees.
class BackwardContext {
 public:
  /// Gradient of output i, or undefined if nothing depends on it. With one output it is always defined.
  const Tensor& grad(int i = 0) const { return grads_[static_cast<size_t>(i)]; }
  /// The i-th saved tensor (undefined if an undefined one was saved).
  Tensor saved(int i);
  /// Whether the gradient of input i is wanted.
  bool needs(int i) const;
  /// Answers with the gradient of input i. May have the shape to which input i was broadcast: it is summed down.
  void set(int i, Tensor gradient);
  /// If input i is a leaf whose gradient can be written where it lives: the tensor to write to and whether to add to
  /// what it holds (else its content is unspecified). The rule must then write it, before it asks for another sink, and
  /// must not call set(i). Saves a temporary and a pass over it.
  struct Sink {
    Tensor tensor;
    bool accumulate = false;
  };
  std::optional<Sink> sink(int i);
  /// The gradient of input i, by `compute`: written into the sink that it is given, or its answer where there is none.
  /// At once, or, of a leaf while gradients are deferred (DeferredGradients), later.
  void compute(int i, std::function<Tensor(const std::optional<Sink>&)> compute);
  const char* op() const;

 private:
  friend class Engine;
  std::shared_ptr<Node> node_;
  std::vector<Tensor> grads_;
  std::vector<Tensor> results_;
  std::vector<bool> sunk_;
  bool leaf_gradients_ = true;
};

using BackwardRule = std::function<void(BackwardContext&)>;

/// Whether a backward rule can itself be differentiated: its body uses differentiable functions only.
enum class Rule : uint8_t {
  kOnce,           ///< calls kernels: a second derivative is an error that names the op
  kDifferentiable  ///< written in differentiable functions
};

/// Puts a function on the tape if grad mode is on and an input requires a gradient; else does nothing.
/// @param op      name in messages; a string literal
/// @param inputs  in the order of the rule's indices; undefined ones are allowed
/// @param outputs tensors just made by this call; they become part of the graph. @throws Error kState if one already is
/// @param saved   tensors the rule needs, inputs and outputs among them; a rule must not capture tensors otherwise
void record(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
            const std::vector<Tensor>& saved, BackwardRule rule, Rule kind = Rule::kOnce);

/// Whether record() would record for these inputs: lets a function skip saving work.
bool needed(std::initializer_list<const Tensor*> inputs);

/// Whether functions record. Per thread; on at the start.
bool grad_mode();
class GradMode {
 public:
  explicit GradMode(bool on);
  ~GradMode();
  GradMode(const GradMode&) = delete;
  GradMode& operator=(const GradMode&) = delete;

 private:
  bool previous_;
};
/// While it lives, nothing is recorded.
struct NoGrad : GradMode {
  NoGrad() : GradMode(false) {}
};

/// Gradients of `outputs` with respect to every leaf they depend on, added to the leaves' grad().
/// @param gradients     none, or one per output; undefined, it stands for 1 if the output has one element
/// @param retain_graph  keeps what the rules saved, so that backward can run again
void backward(const std::vector<Tensor>& outputs, const std::vector<Tensor>& gradients = {}, bool retain_graph = false);

/// Gradients of `outputs` with respect to `inputs`, returned; grad() of no leaf changes. An input that the outputs do
/// not depend on gets an undefined tensor. Only rules between the two run. With create_graph the results can be
/// differentiated again. Results may share memory with each other: clone() one before changing it in place.
std::vector<Tensor> gradients(const std::vector<Tensor>& outputs, const std::vector<Tensor>& inputs,
                              const std::vector<Tensor>& output_gradients = {}, bool retain_graph = false,
                              bool create_graph = false);

/// Runs function(inputs) without keeping what its rules save; the backward pass runs it a second time to have it.
/// Same numbers, same graph, less memory (Chen et al. 2016). May be nested. The function must be a pure function of its
/// arguments and of unchanged parameters; random numbers are, because they are counted, not drawn. Where the second run
/// is seen to differ (an argument or a saved parameter changed in place, other tensors saved), backward() gives kState.
std::vector<Tensor> checkpoint(std::function<std::vector<Tensor>(const std::vector<Tensor>&)> function,
                               const std::vector<Tensor>& inputs);

/// Whether this thread is in the second run of such a function: what a function counts, it has counted in the first.
bool recomputing();

/// Whether a function whose own backward pass needs its result keeps it, or a recipe for it: see remade().
enum class Keep : uint8_t { kValue, kRecipe };

/// From now on a rule that saves `output`, or a view of it, keeps a recipe in its place: function(inputs), called when
/// the first such rule runs. For results that are cheap to make again from tensors that are kept anyway (selective
/// recomputation, Korthikanti et al. 2022, section 5). Inputs are saved tensors like others: they go through hooks,
/// may be remade themselves, and changing one in place is an error that names both functions.
/// @param op        name in messages; a string literal
/// @param output    just made and row-major, not part of another tensor. If it is changed in place before a rule saves
///                  it, that rule keeps the tensor as usual
/// @param function  gives `output` again bit for bit, without a graph; must not capture tensors
/// @throws Error kState if the function answers with another shape or dtype.
void remade(const char* op, const Tensor& output, std::function<Tensor(const std::vector<Tensor>&)> function,
            const std::vector<Tensor>& inputs);

/// While it lives, tensors that functions of this thread save for their backward pass go through `pack`, which answers
/// with a function that brings the tensor back. Recomputation and offloading are made of this.
class SavedTensorHooks {
 public:
  using Pack = std::function<std::function<Tensor()>(const Tensor&)>;
  explicit SavedTensorHooks(Pack pack);
  ~SavedTensorHooks();
  SavedTensorHooks(const SavedTensorHooks&) = delete;
  SavedTensorHooks& operator=(const SavedTensorHooks&) = delete;
  static const Pack* current();

 private:
  Pack pack_;
  SavedTensorHooks* previous_;
};

/// Gradients of leaves that are computed later than the rest of their backward pass: those of weights, for which nobody
/// waits, while the gradients of a stage's inputs are on their way (Qi et al. 2023). Of a leaf that gets other
/// gradients too, those come first.
class DeferredGradients {
 public:
  /// While it lives, what backward passes of this thread hand to BackwardContext::compute() for leaves is put off.
  class Scope {
   public:
    explicit Scope(DeferredGradients& into);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    DeferredGradients* previous_;
  };

  /// Computes all of them in the order in which they were put off, and tells leaves that their gradients are ready.
  void run();
  bool empty() const { return waiting_.empty(); }

 private:
  friend class BackwardContext;
  friend class Engine;
  struct Waiting {
    Tensor leaf;
    const char* op;
    std::function<Tensor(const std::optional<BackwardContext::Sink>&)> compute;
  };
  static DeferredGradients* current();
  bool waits_for(const Tensor& leaf) const;
  std::vector<Waiting> waiting_;
};

/// While it lives, every function that this thread records is shown to `see` when its outputs are there: what looks for
/// the first tensor that overflowed, or counts what a model does, is made of this.
class RecordObserver {
 public:
  using See =
      std::function<void(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs)>;
  explicit RecordObserver(See see);
  ~RecordObserver();
  RecordObserver(const RecordObserver&) = delete;
  RecordObserver& operator=(const RecordObserver&) = delete;
  /// Whether this thread has one.
  static bool active();

 private:
  See see_;
  See* previous_;
};

/// The one place where gradients meet: sum += gradient (sum may be undefined: then it is the gradient). `gradient` is
/// summed down to `shape` if it was broadcast. @throws Error naming `op` if shape, dtype or device do not fit.
void accumulate(Tensor& sum, Tensor gradient, const Shape& shape, DType dtype, Device device, const char* op);

/// Prints the tape behind a tensor, one node a line: for people who want to see it.
std::string describe_graph(const Tensor& tensor, int limit = 50);

}  // namespace weft::autograd
