#pragma once
#include "core/autograd.h"

// The tape itself: for autograd.cpp and tensor.cpp only.

namespace weft::autograd {

/// One recorded call, or the end of the tape at a leaf (rule empty, leaf set).
class Node {
 public:
  ~Node();

  const char* op = "";
  uint64_t sequence = 0;    ///< order of recording
  std::vector<Edge> edges;  ///< one per input; null where no gradient is wanted
  struct Output {
    Shape shape;
    DType dtype;
    Device device;
  };
  std::vector<Output> outputs;
  std::vector<SavedTensor> saved;
  BackwardRule rule;
  Rule kind = Rule::kOnce;
  bool released = false;
  Tensor leaf;                                                              ///< leaves only
  std::vector<std::pair<int, std::function<Tensor(const Tensor&)>>> hooks;  ///< by output
};

/// How to have a tensor again (autograd::remade).
class Recipe {
 public:
  using Function = std::function<Tensor(const std::vector<Tensor>&)>;
  Recipe(const char* op, const Tensor& output, Function function, const std::vector<Tensor>& inputs);

  /// Whether the storage still holds what the function gives.
  bool gives(const Storage& storage) const { return storage.version() == version_; }
  void add_user() { ++users_; }
  /// The whole tensor. It is kept until each user has had it, so that rules that follow one another share it.
  Tensor value();

 private:
  const char* op_;
  uint64_t version_;
  Shape shape_;
  DType dtype_;
  Function function_;
  std::vector<SavedTensor> inputs_;
  Tensor value_;
  int users_ = 0, served_ = 0;
};

/// A tensor's place in the graph.
struct Meta {
  bool requires_grad = false;
  std::shared_ptr<Node> node;  ///< what made it; null for a leaf
  int output = 0;              ///< its number among the node's outputs
  Tensor grad;
  bool retains_grad = false;                                         ///< no leaf, but keeps its gradient
  std::weak_ptr<Node> accumulator;                                   ///< leaves: the end of the tape
  std::vector<std::function<Tensor(const Tensor&)>> hooks;           ///< leaves
  std::vector<std::function<void(const Tensor&)>> grad_ready_hooks;  ///< leaves
};

/// Where gradients of `tensor` go; a null node if none is wanted.
Edge edge_to(const Tensor& tensor);

}  // namespace weft::autograd
