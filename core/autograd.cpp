#include "core/autograd.h"

#include <algorithm>
#include <atomic>
#include <queue>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "core/autograd_node.h"

namespace weft::autograd {
namespace {

thread_local bool recording = true;
thread_local RecordObserver::See* observer = nullptr;
thread_local SavedTensorHooks* saved_tensor_hooks = nullptr;
thread_local DeferredGradients* deferred_gradients = nullptr;
std::atomic<uint64_t> next_sequence = 0;

/// Leaves come first among nodes that are ready, so that their hooks run as early as they can.
constexpr uint64_t kLeafSequence = UINT64_MAX;

bool wants_gradient(const Tensor& tensor) {
  return tensor.defined() && tensor.autograd_meta() != nullptr && tensor.autograd_meta()->requires_grad;
}

}  // namespace

Node::~Node() {
  // A long tape would otherwise be freed by recursion as deep as the tape is long.
  thread_local std::vector<std::shared_ptr<Node>>* pending = nullptr;
  if (pending != nullptr) {
    for (Edge& edge : edges) {
      if (edge.node) pending->push_back(std::move(edge.node));
    }
    return;
  }
  std::vector<std::shared_ptr<Node>> nodes;
  pending = &nodes;
  saved.clear();
  for (Edge& edge : edges) {
    if (edge.node) nodes.push_back(std::move(edge.node));
  }
  while (!nodes.empty()) {
    std::shared_ptr<Node> node = std::move(nodes.back());
    nodes.pop_back();
    if (node.use_count() == 1) node->saved.clear();
    node.reset();
  }
  pending = nullptr;
}

Edge edge_to(const Tensor& tensor) {
  if (!wants_gradient(tensor)) return {};
  const std::shared_ptr<Meta>& meta = tensor.autograd_meta();
  if (meta->node) return {meta->node, meta->output};
  std::shared_ptr<Node> node = meta->accumulator.lock();
  if (!node) {
    node = std::make_shared<Node>();
    node->op = "leaf";
    node->sequence = kLeafSequence;
    node->outputs = {{tensor.shape(), tensor.dtype(), tensor.device()}};
    node->leaf = tensor;
    meta->accumulator = node;
  }
  return {node, 0};
}

// ---- saved tensors ----

SavedTensor::SavedTensor(const Tensor& tensor, const std::vector<Tensor>& outputs) {
  if (!tensor.defined()) return;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (tensor.is_same(outputs[i])) output_ = static_cast<int>(i);
  }
  if (output_ < 0) meta_ = tensor.autograd_meta();
  if (const auto& recipe = tensor.storage()->recipe(); recipe != nullptr && recipe->gives(*tensor.storage())) {
    recipe_ = recipe;
    recipe_->add_user();
    shape_ = tensor.shape(), strides_ = tensor.strides(), offset_ = tensor.offset();
    return;
  }
  version_ = tensor.storage()->version();
  if (const auto* pack = SavedTensorHooks::current()) {
    unpacker_ = (*pack)(tensor.detach());
  } else {
    tensor_ = tensor.detach();
  }
}

Tensor SavedTensor::value(const char* op) const {
  if (recipe_) return Tensor::make_view(recipe_->value(), shape_, strides_, offset_);
  if (unpacker_) return unpacker_();
  if (tensor_.defined() && tensor_.storage()->version() != version_) {
    fail(ErrorKind::kState, op, "the backward pass needs a tensor (", tensor_.describe(), ") that [",
         tensor_.storage()->last_change(), "] changed in place after [", op, "] saved it (version ",
         tensor_.storage()->version(), ", saved at ", version_,
         "). Hint: change a clone(), or make the change after backward()");
  }
  return tensor_;
}

Tensor SavedTensor::unpack(const std::shared_ptr<Node>& node) const {
  Tensor tensor = value(node->op);
  if (!tensor.defined() || !recording) return tensor;
  std::shared_ptr<Meta> meta = meta_;
  if (output_ >= 0) {
    meta = std::make_shared<Meta>();
    meta->requires_grad = true;
    meta->node = node;
    meta->output = output_;
  }
  tensor = tensor.detach();
  tensor.set_autograd_meta(meta);
  return tensor;
}

SavedTensorHooks::SavedTensorHooks(Pack pack) : pack_(std::move(pack)), previous_(saved_tensor_hooks) {
  saved_tensor_hooks = this;
}
SavedTensorHooks::~SavedTensorHooks() { saved_tensor_hooks = previous_; }
const SavedTensorHooks::Pack* SavedTensorHooks::current() {
  return saved_tensor_hooks ? &saved_tensor_hooks->pack_ : nullptr;
}

// ---- recording ----

bool grad_mode() { return recording; }
GradMode::GradMode(bool on) : previous_(recording) { recording = on; }
GradMode::~GradMode() { recording = previous_; }

bool needed(std::initializer_list<const Tensor*> inputs) {
  return recording &&
         std::any_of(inputs.begin(), inputs.end(), [](const Tensor* tensor) { return wants_gradient(*tensor); });
}

void record(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
            const std::vector<Tensor>& saved, BackwardRule rule, Rule kind) {
  if (!recording || std::none_of(inputs.begin(), inputs.end(), wants_gradient)) return;
  auto node = std::make_shared<Node>();
  node->op = op;
  node->sequence = next_sequence.fetch_add(1, std::memory_order_relaxed);
  node->rule = std::move(rule);
  node->kind = kind;
  node->edges.reserve(inputs.size());
  for (const Tensor& input : inputs) node->edges.push_back(edge_to(input));
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (wants_gradient(outputs[i])) {
      fail(ErrorKind::kState, op, "output ", i,
           " is already part of a graph; a recorded function must answer with new tensors");
    }
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Tensor& output = outputs[i];
    node->outputs.push_back({output.shape(), output.dtype(), output.device()});
    if (!is_float(output.dtype())) continue;
    auto meta = std::make_shared<Meta>();
    meta->requires_grad = true;
    meta->node = node;
    meta->output = static_cast<int>(i);
    output.set_autograd_meta(std::move(meta));
  }
  node->saved.reserve(saved.size());
  for (const Tensor& tensor : saved) node->saved.emplace_back(tensor, outputs);
  if (observer != nullptr) (*observer)(op, inputs, outputs);
}

RecordObserver::RecordObserver(See see) : see_(std::move(see)), previous_(observer) { observer = &see_; }
RecordObserver::~RecordObserver() { observer = previous_; }
bool RecordObserver::active() { return observer != nullptr; }

// ---- backward ----

Tensor BackwardContext::saved(int i) { return node_->saved.at(static_cast<size_t>(i)).unpack(node_); }

bool BackwardContext::needs(int i) const { return node_->edges.at(static_cast<size_t>(i)).node != nullptr; }

void BackwardContext::set(int i, Tensor gradient) { results_.at(static_cast<size_t>(i)) = std::move(gradient); }

const char* BackwardContext::op() const { return node_->op; }

/// Where the gradient of a leaf can be written in place, or nothing.
static std::optional<BackwardContext::Sink> sink_of(const Tensor& leaf, const char* op) {
  Meta& meta = *leaf.autograd_meta();
  if (!meta.hooks.empty()) return std::nullopt;
  if (meta.grad.defined()) {
    if (!meta.grad.is_contiguous()) return std::nullopt;
    meta.grad.storage()->bump(op);
    return BackwardContext::Sink{meta.grad, true};
  }
  const MemoryScope scope(MemoryCategory::gradients);
  meta.grad = Tensor::empty_like(leaf);
  return BackwardContext::Sink{meta.grad, false};
}

std::optional<BackwardContext::Sink> BackwardContext::sink(int i) {
  const Edge& edge = node_->edges.at(static_cast<size_t>(i));
  if (!leaf_gradients_ || recording || edge.node == nullptr || !edge.node->leaf.defined()) return std::nullopt;
  const auto sink = sink_of(edge.node->leaf, node_->op);
  if (sink) sunk_.at(static_cast<size_t>(i)) = true;
  return sink;
}

void BackwardContext::compute(int i, std::function<Tensor(const std::optional<Sink>&)> compute) {
  const Edge& edge = node_->edges.at(static_cast<size_t>(i));
  if (DeferredGradients* later = DeferredGradients::current(); later != nullptr && leaf_gradients_ && !recording &&
                                                               edge.node != nullptr && edge.node->leaf.defined() &&
                                                               edge.node->leaf.autograd_meta()->hooks.empty()) {
    later->waiting_.push_back({edge.node->leaf, node_->op, std::move(compute)});
    return;
  }
  const auto into = sink(i);
  Tensor gradient = compute(into);
  if (!into) set(i, std::move(gradient));
}

DeferredGradients::Scope::Scope(DeferredGradients& into) : previous_(deferred_gradients) { deferred_gradients = &into; }
DeferredGradients::Scope::~Scope() { deferred_gradients = previous_; }
DeferredGradients* DeferredGradients::current() { return deferred_gradients; }

bool DeferredGradients::waits_for(const Tensor& leaf) const {
  return std::any_of(waiting_.begin(), waiting_.end(),
                     [&](const Waiting& waiting) { return waiting.leaf.is_same(leaf); });
}

void DeferredGradients::run() {
  const GradMode mode(false);
  std::vector<Waiting> all = std::exchange(waiting_, {});
  for (size_t i = 0; i < all.size(); ++i) {
    const Waiting now = std::move(all[i]);
    Meta& meta = *now.leaf.autograd_meta();
    const auto into = sink_of(now.leaf, now.op);
    const Tensor gradient = now.compute(into);
    if (!into) accumulate(meta.grad, gradient, now.leaf.shape(), now.leaf.dtype(), now.leaf.device(), now.op);
    const bool more = std::any_of(all.begin() + static_cast<int64_t>(i) + 1, all.end(),
                                  [&](const Waiting& waiting) { return waiting.leaf.is_same(now.leaf); });
    if (more) continue;
    const auto hooks = meta.grad_ready_hooks;
    for (const auto& hook : hooks) hook(now.leaf);
  }
}

void accumulate(Tensor& sum, Tensor gradient, const Shape& shape, DType dtype, Device device, const char* op) {
  if (gradient.dtype() != dtype || gradient.device() != device) {
    fail(ErrorKind::kDType, op, "the gradient of an input is ", gradient.describe(), " on ", gradient.device(),
         "; the input is ", dtype, " ", shape, " on ", device);
  }
  if (!(gradient.shape() == shape)) {
    if (!broadcastable_to(shape, gradient.shape())) {
      fail(ErrorKind::kShape, op, "the gradient of an input has shape ", gradient.shape(), "; the input is ", shape,
           " and does not broadcast to that");
    }
    Tensor reduced = Tensor::empty(shape, dtype, device);
    if (recording && gradient.requires_grad()) {
      const Shape full = gradient.shape();
      record(
          "sum_broadcast", {gradient}, {reduced}, {},
          [full](BackwardContext& context) { context.set(0, context.grad().expand(full)); }, Rule::kDifferentiable);
    }
    if (!DryRun::active()) {
      StridedView to = reduced.view();
      to.strides = broadcast_strides(shape, to.strides, gradient.shape(), op);
      to.shape = gradient.shape();
      backend(device).sum_broadcast(to, gradient.view());
    }
    gradient = std::move(reduced);
  }
  if (!sum.defined()) {
    sum = std::move(gradient);
    return;
  }
  if (!recording && sum.is_sole_owner() && sum.is_contiguous()) {
    if (!DryRun::active()) backend(device).add(sum.view(), gradient.view());
    return;
  }
  // A new tensor: the first gradient may be shared with another branch of the graph, or a part of one.
  Tensor total = Tensor::empty(shape, dtype, device);
  if (recording && (sum.requires_grad() || gradient.requires_grad())) {
    record(
        "accumulate", {sum, gradient}, {total}, {},
        [](BackwardContext& context) { context.set(0, context.grad()), context.set(1, context.grad()); },
        Rule::kDifferentiable);
  }
  if (!DryRun::active()) {
    backend(device).copy(total.view(), sum.view());
    backend(device).add(total.view(), gradient.view());
  }
  sum = std::move(total);
}

/// One backward pass.
class Engine {
 public:
  Engine(bool retain_graph, bool create_graph, bool leaf_gradients)
      : retain_graph_(retain_graph), create_graph_(create_graph), leaf_gradients_(leaf_gradients) {}

  void capture(const Edge& edge, Tensor* result) {
    captured_.push_back(edge.node);  // kept alive: a leaf outside the graph would leave its address to another node
    captures_[edge.node.get()].push_back({edge.index, result});
  }

  void run(const std::vector<Tensor>& outputs, const std::vector<Tensor>& gradients) {
    if (outputs.empty()) fail(ErrorKind::kValue, "backward", "needs at least one tensor to start from");
    if (!gradients.empty() && gradients.size() != outputs.size()) {
      fail(ErrorKind::kValue, "backward", gradients.size(), " gradients for ", outputs.size(),
           " tensors; give none or one for each");
    }
    const GradMode mode(create_graph_);
    for (size_t i = 0; i < outputs.size(); ++i) add_root(outputs[i], gradients.empty() ? Tensor() : gradients[i]);
    count_dependencies();
    for (const std::shared_ptr<Node>& root : roots_) {
      State& s = states_.at(root.get());
      if (s.wanted && s.dependencies == 0 && !std::exchange(s.ready, true)) push(root);
    }
    while (!ready_.empty()) {
      const std::shared_ptr<Node> node = ready_.top().node;
      ready_.pop();
      process(node);
    }
  }

 private:
  struct State {
    std::shared_ptr<Node> node;
    int dependencies = 0;
    std::vector<Tensor> gradients;
    bool written = false;  // a sink was: the leaf has part of its gradient already
    bool wanted = false;   // it is to be processed: a gradient that is asked for lies here or behind it
    bool passes = false;   // its rule is to be run: a gradient that is asked for lies behind it
    bool ready = false;    // it has been queued
  };
  struct Ready {
    std::shared_ptr<Node> node;
    uint64_t order;  // of becoming ready: leaves all have one sequence number
    bool operator<(const Ready& other) const {
      return node->sequence != other.node->sequence ? node->sequence < other.node->sequence : order > other.order;
    }
  };

  void push(const std::shared_ptr<Node>& node) { ready_.push({node, next_order_++}); }

  State& state(const std::shared_ptr<Node>& node) {
    State& s = states_[node.get()];
    if (s.node == nullptr) {
      s.node = node;
      s.gradients.resize(node->outputs.size());
    }
    return s;
  }

  void add_root(const Tensor& output, Tensor gradient) {
    if (!output.defined() || !output.requires_grad()) {
      fail(ErrorKind::kState, "backward", "the tensor does not depend on anything that requires a gradient",
           output.defined() ? " (" + output.describe() + ")" : "",
           ". Hint: was it computed under NoGrad, or detached?");
    }
    if (!gradient.defined()) {
      if (output.numel() != 1) {
        fail(ErrorKind::kShape, "backward", "starts from one element, got ", output.describe(),
             ". Hint: sum() or mean() it, or pass a gradient");
      }
      gradient = Tensor::ones(output.shape(), output.dtype(), output.device());
    } else if (!(gradient.shape() == output.shape())) {
      fail(ErrorKind::kShape, "backward", "the gradient is ", gradient.describe(), ", the tensor ", output.describe(),
           "; they must have one shape");
    }
    const Edge edge = edge_to(output);
    State& s = state(edge.node);
    accumulate(s.gradients[static_cast<size_t>(edge.index)], gradient, output.shape(), output.dtype(), output.device(),
               "backward");
    roots_.push_back(edge.node);
  }

  void count_dependencies() {
    std::vector<std::shared_ptr<Node>> stack = roots_, nodes;
    std::unordered_set<Node*> seen;
    while (!stack.empty()) {
      const std::shared_ptr<Node> node = std::move(stack.back());
      stack.pop_back();
      if (!seen.insert(node.get()).second) continue;
      nodes.push_back(node);
      for (const Edge& edge : node->edges) {
        if (edge.node != nullptr) stack.push_back(edge.node);
      }
    }
    // Edges lead to what was recorded earlier, or to a leaf: in this order a node comes after all that it leads to.
    const auto rank = [](const std::shared_ptr<Node>& node) { return node->leaf.defined() ? 0 : node->sequence + 1; };
    std::sort(nodes.begin(), nodes.end(), [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
    for (const std::shared_ptr<Node>& node : nodes) {
      State& s = state(node);
      for (const Edge& edge : node->edges) {
        if (edge.node != nullptr && state(edge.node).wanted) s.passes = true;
      }
      s.wanted = s.passes || (leaf_gradients_ ? node->leaf.defined() : captures_.contains(node.get()));
      if (s.passes && node->released) {
        fail(ErrorKind::kState, node->op,
             "this part of the graph was used by an earlier backward pass, which released what [", node->op,
             "] had saved. Hint: pass retain_graph to every backward pass but the last, or compute the loss again");
      }
      if (!s.passes) continue;
      for (const Edge& edge : node->edges) {
        if (edge.node != nullptr) ++state(edge.node).dependencies;
      }
    }
  }

  void process(const std::shared_ptr<Node>& node) {
    State current = std::move(states_.at(node.get()));
    std::vector<Tensor>& gradients = current.gradients;
    // Copies of the lists: a hook may register another one.
    const auto node_hooks = node->hooks;
    for (const auto& [output, hook] : node_hooks) apply_hook(hook, gradients[static_cast<size_t>(output)], *node);
    if (node->leaf.defined()) {
      const auto leaf_hooks = node->leaf.autograd_meta()->hooks;
      for (const auto& hook : leaf_hooks) apply_hook(hook, gradients[0], *node);
    }
    if (const auto found = captures_.find(node.get()); found != captures_.end()) {
      for (const auto& [output, result] : found->second) *result = gradients[static_cast<size_t>(output)];
    }
    if (node->leaf.defined()) return finish_leaf(*node, gradients[0], current.written);
    if (!current.passes) return;
    const bool any =
        std::any_of(gradients.begin(), gradients.end(), [](const Tensor& gradient) { return gradient.defined(); });
    BackwardContext context;
    context.results_.resize(node->edges.size());
    context.sunk_.resize(node->edges.size());
    if (any) {
      if (create_graph_ && node->kind == Rule::kOnce) {
        fail(ErrorKind::kState, node->op,
             "has no second derivative: its backward rule is a kernel of its own. Hint: use its composed form");
      }
      context.node_ = node;
      context.grads_ = std::move(gradients);
      context.leaf_gradients_ = leaf_gradients_;
      node->rule(context);
    }
    for (size_t i = 0; i < node->edges.size(); ++i) {
      const Edge& edge = node->edges[i];
      if (edge.node == nullptr) continue;
      State& next = state(edge.node);
      next.written = next.written || context.sunk_[i];
      if (Tensor& result = context.results_[i]; result.defined() && next.wanted) {
        const Node::Output& target = edge.node->outputs[static_cast<size_t>(edge.index)];
        accumulate(next.gradients[static_cast<size_t>(edge.index)], std::move(result), target.shape, target.dtype,
                   target.device, node->op);
      }
      if (--next.dependencies == 0 && next.wanted && !std::exchange(next.ready, true)) push(edge.node);
    }
    if (!retain_graph_) {
      node->saved.clear();
      node->rule = nullptr;
      node->released = true;
    }
  }

  static void apply_hook(const std::function<Tensor(const Tensor&)>& hook, Tensor& gradient, const Node& node) {
    if (!gradient.defined()) return;
    Tensor replaced = hook(gradient);
    if (!replaced.defined()) return;
    if (!(replaced.shape() == gradient.shape()) || replaced.dtype() != gradient.dtype()) {
      fail(ErrorKind::kShape, node.op, "a gradient hook answered with ", replaced.describe(),
           " for a gradient that is ", gradient.describe());
    }
    gradient = std::move(replaced);
  }

  void finish_leaf(const Node& node, Tensor& gradient, bool written) {
    if (!leaf_gradients_ || (!gradient.defined() && !written)) return;
    const Tensor& leaf = node.leaf;
    Meta& meta = *leaf.autograd_meta();
    if (gradient.defined()) {
      if (!meta.grad.defined()) {
        // The leaf keeps its gradient beyond this pass: it must own it, and row by row.
        const bool own = gradient.is_sole_owner() && gradient.is_contiguous() &&
                         gradient.storage()->bytes() == gradient.numel() * size_of(gradient.dtype());
        const MemoryScope scope(MemoryCategory::gradients);
        meta.grad = own ? std::move(gradient) : gradient.clone();
        if (own) meta.grad.storage()->recount(MemoryCategory::gradients);
      } else if (meta.grad.is_contiguous()) {
        if (!DryRun::active()) backend(leaf.device()).add(meta.grad.view(), gradient.view());
        meta.grad.storage()->bump("backward");
      } else {  // set by hand and perhaps expanded
        const MemoryScope scope(MemoryCategory::gradients);
        accumulate(meta.grad, gradient, leaf.shape(), leaf.dtype(), leaf.device(), "backward");
      }
    }
    // Another part of it comes later.
    if (deferred_gradients != nullptr && deferred_gradients->waits_for(leaf)) return;
    const auto hooks = meta.grad_ready_hooks;
    for (const auto& hook : hooks) hook(leaf);
  }

  const bool retain_graph_, create_graph_, leaf_gradients_;
  std::unordered_map<Node*, State> states_;
  std::unordered_map<Node*, std::vector<std::pair<int, Tensor*>>> captures_;
  std::vector<std::shared_ptr<Node>> roots_, captured_;
  std::priority_queue<Ready> ready_;
  uint64_t next_order_ = 0;
};

void backward(const std::vector<Tensor>& outputs, const std::vector<Tensor>& gradients, bool retain_graph) {
  Engine(retain_graph, false, true).run(outputs, gradients);
}

std::vector<Tensor> gradients(const std::vector<Tensor>& outputs, const std::vector<Tensor>& inputs,
                              const std::vector<Tensor>& output_gradients, bool retain_graph, bool create_graph) {
  std::vector<Tensor> results(inputs.size());
  Engine engine(retain_graph || create_graph, create_graph, false);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Edge edge = edge_to(inputs[i]);
    if (edge.node == nullptr)
      fail(ErrorKind::kState, "gradients", "input ", i, " (", inputs[i].describe(), ") does not require a gradient");
    engine.capture(edge, &results[i]);
  }
  engine.run(outputs, output_gradients);
  return results;
}

std::string describe_graph(const Tensor& tensor, int limit) {
  std::string out;
  std::vector<std::pair<std::shared_ptr<Node>, int>> stack = {{edge_to(tensor).node, 0}};
  std::unordered_map<Node*, bool> seen;
  while (!stack.empty() && limit > 0) {
    const auto [node, depth] = stack.back();
    stack.pop_back();
    if (node == nullptr) continue;
    std::string outputs;
    for (const Node::Output& output : node->outputs) outputs += concat(' ', output.dtype, ' ', output.shape);
    out += std::string(static_cast<size_t>(depth), ' ') + node->op + outputs + (seen[node.get()] ? " (above)\n" : "\n");
    --limit;
    if (std::exchange(seen[node.get()], true)) continue;
    for (auto edge = node->edges.rbegin(); edge != node->edges.rend(); ++edge) stack.push_back({edge->node, depth + 1});
  }
  return out;
}

}  // namespace weft::autograd
