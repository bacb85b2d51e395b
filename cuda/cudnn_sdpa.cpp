// Attention through cuDNN's graph API, whose graphs NVIDIA's header-only frontend builds. The one file that sees it.
#include "cuda/cudnn_sdpa.h"

#include <cudnn.h>
#include <nvrtc.h>

#include <map>
#include <unordered_map>

#include "core/error.h"
#include "cuda/context.h"
#include "cuda/cudnn_library.h"

namespace weft::cuda {

/// Stands for a function of NVRTC's, with which the frontend compiles kernels of its own for operations other than
/// attention: nothing here calls it, and nobody links it.
template <class... Arguments>
nvrtcResult no_nvrtc(Arguments&&...) {
  return NVRTC_ERROR_INTERNAL_ERROR;
}

}  // namespace weft::cuda
#define nvrtcCompileProgram ::weft::cuda::no_nvrtc
#define nvrtcCreateProgram ::weft::cuda::no_nvrtc
#define nvrtcDestroyProgram ::weft::cuda::no_nvrtc
#define nvrtcGetCUBIN ::weft::cuda::no_nvrtc
#define nvrtcGetCUBINSize ::weft::cuda::no_nvrtc
#define nvrtcGetProgramLog ::weft::cuda::no_nvrtc
#define nvrtcGetProgramLogSize ::weft::cuda::no_nvrtc
// The frontend calls cuDNN by its symbols, which nobody links: each is the function of the library that was loaded.
#define cudnnGetStream ::weft::cuda::cudnn().GetStream
#define cudnnGetVersion ::weft::cuda::cudnn().GetVersion
#define cudnnGetErrorString ::weft::cuda::cudnn().GetErrorString
#define cudnnGetLastErrorString ::weft::cuda::cudnn().GetLastErrorString
#define cudnnBackendCreateDescriptor ::weft::cuda::cudnn().BackendCreateDescriptor
#define cudnnBackendDestroyDescriptor ::weft::cuda::cudnn().BackendDestroyDescriptor
#define cudnnBackendExecute ::weft::cuda::cudnn().BackendExecute
#define cudnnBackendFinalize ::weft::cuda::cudnn().BackendFinalize
#define cudnnBackendGetAttribute ::weft::cuda::cudnn().BackendGetAttribute
#define cudnnBackendSetAttribute ::weft::cuda::cudnn().BackendSetAttribute
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>

namespace weft::cuda {
namespace {

namespace fe = cudnn_frontend;
using fe::graph::Graph;
using fe::graph::Tensor_attributes;
using Attributes = std::shared_ptr<Tensor_attributes>;

/// The first words of what the frontend says, which may be pages, in one line.
std::string brief(std::string text) {
  constexpr size_t kMost = 400;
  if (text.size() > kMost) text = text.substr(0, kMost) + " ...";
  for (char& c : text) c = c == '\n' ? ' ' : c;
  return text;
}

void check(const fe::error_t& status, const char* what) {
  if (status.is_good()) return;
  fail(ErrorKind::kDevice, "cudnn", what, ": ", brief(status.err_msg));
}

void check(cudnnStatus_t status, const char* call) {
  if (status != CUDNN_STATUS_SUCCESS) fail(ErrorKind::kDevice, "cudnn", call, ": ", cudnn().GetErrorString(status));
}

/// work(), with the exceptions that the frontend throws, beside the statuses that it gives, as an Error.
template <class Work>
auto in_our_words(Work&& work) {
  try {
    return work();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    fail(ErrorKind::kDevice, "cudnn", "no plan for attention could be made: ", brief(error.what()));
  }
}

/// Tensors have their number in the list above, and 1, as their id; 0 has a meaning of its own to the frontend.
int64_t id_of(SdpaTensor which) { return which + 1; }

struct Layout {
  std::vector<int64_t> sizes, strides;
};

Layout layout_of(const Sdpa& s, SdpaTensor which) {
  if (which == kLse) return {{s.batch, s.heads, s.tokens, 1}, {s.heads * s.tokens, s.tokens, 1, 1}};
  const bool keys = which == kK || which == kV || which == kDk || which == kDv;
  const Sdpa::Strides& strides = s.strides[which];
  return {{s.batch, keys ? s.kv_heads : s.heads, s.tokens, s.head_size},
          {strides.batch, strides.head, strides.token, 1}};
}

Attributes input(Graph& graph, const Sdpa& s, SdpaTensor which, const char* name) {
  const Layout layout = layout_of(s, which);
  Tensor_attributes attributes;
  attributes.set_name(name).set_uid(id_of(which)).set_dim(layout.sizes).set_stride(layout.strides);
  if (which == kLse) attributes.set_data_type(fe::DataType_t::FLOAT);
  return graph.tensor(attributes);
}

void output(const Attributes& tensor, const Sdpa& s, SdpaTensor which) {
  const Layout layout = layout_of(s, which);
  tensor->set_output(true).set_uid(id_of(which)).set_dim(layout.sizes).set_stride(layout.strides);
  if (which == kLse) tensor->set_data_type(fe::DataType_t::FLOAT);
}

/// The graph of the pass. Sums and weights are kept in f32, and rounded to the dtype where they are multiplied.
/// @param compute_capability  major * 10 + minor; how the frontend puts attention together depends on it
std::unique_ptr<Graph> graph_of(const Sdpa& s, int compute_capability) {
  auto graph = std::make_unique<Graph>();
  graph->set_sm_version(compute_capability)
      .set_io_data_type(s.dtype == DType::bf16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  const Attributes q = input(*graph, s, kQ, "q"), k = input(*graph, s, kK, "k"), v = input(*graph, s, kV, "v");
  const auto scale = static_cast<float>(s.scale);
  if (!s.backward) {
    fe::graph::SDPA_attributes attributes;
    attributes.set_name("attention").set_generate_stats(true).set_attn_scale(scale).set_causal_mask(s.causal);
    const auto [out, lse] = graph->sdpa(q, k, v, attributes);
    output(out, s, kOut);
    output(lse, s, kLse);
    return graph;
  }
  const Attributes out = input(*graph, s, kOut, "out"), dout = input(*graph, s, kDout, "dout"),
                   lse = input(*graph, s, kLse, "lse");
  fe::graph::SDPA_backward_attributes attributes;
  attributes.set_name("attention_backward").set_attn_scale(scale).set_causal_mask(s.causal);
  attributes.set_deterministic_algorithm(true);
  const auto [dq, dk, dv] = graph->sdpa_backward(q, k, v, out, dout, lse, attributes);
  output(dq, s, kDq);
  output(dk, s, kDk);
  output(dv, s, kDv);
  return graph;
}

/// Has cuDNN propose plans for the graph and keeps those that run on its device with the same bits every time.
/// @param handle  null where the device is described
void propose(Graph& graph, cudnnHandle_t handle) {
  check(graph.validate(), "the graph of attention is not valid");
  check(graph.build_operation_graph(handle), "the graph of attention is not accepted");
  check(graph.create_execution_plans({fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK}), "there is no plan for attention");
  graph.deselect_numeric_notes({fe::NumericalNote_t::NONDETERMINISTIC});
  check(graph.check_support(), "no plan for attention is supported");
}

class FrontendPlan final : public SdpaPlan {
 public:
  FrontendPlan(cudnnHandle_t handle, const Context& context, const Sdpa& s)
      : handle_(handle), graph_(graph_of(s, context.compute_capability)) {
    propose(*graph_, handle_);
    check(graph_->build_plans(), "no plan for attention could be made");
    int64_t bytes = 0;
    check(graph_->get_workspace_size(bytes), "the plan for attention does not say what memory it needs");
    workspace = static_cast<size_t>(bytes);
  }

  void run(const SdpaPointers& tensors, void* memory) override {
    std::unordered_map<int64_t, void*> by_id;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i] != nullptr) by_id.emplace(id_of(static_cast<SdpaTensor>(i)), tensors[i]);
    }
    check(graph_->execute(handle_, by_id, memory), "attention could not be queued");
  }

 private:
  cudnnHandle_t handle_;
  std::unique_ptr<Graph> graph_;
};

/// cuDNN's handle of a device, which works on its stream; kept until the program ends.
cudnnHandle_t handle_of(const Context& context) {
  static auto& handles = *new std::map<int, cudnnHandle_t>;
  const auto [place, made] = handles.try_emplace(context.index, nullptr);
  if (place->second == nullptr) {
    check(cudnn().Create(&place->second), "cudnnCreate");
    check(cudnn().SetStream(place->second, context.stream), "cudnnSetStream");
  }
  return place->second;
}

std::string version_text(size_t version) {
  return concat(version / 10000, '.', version / 100 % 100, '.', version % 100);
}

}  // namespace

std::string why_no_cudnn() {
  try {
    cudnn();
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

std::string cudnn_version() { return version_text(cudnn().GetVersion()); }

std::string describe_cudnn() {
  const std::string built =
      concat("the build saw ", version_text(CUDNN_VERSION), " and its frontend ", CUDNN_FRONTEND_MAJOR_VERSION, '.',
             CUDNN_FRONTEND_MINOR_VERSION, '.', CUDNN_FRONTEND_PATCH_VERSION);
  const std::string why = why_no_cudnn();
  if (!why.empty()) return concat("unusable: ", why, "; ", built, ": attention is our own");
  return concat(cudnn_version(), ", ", built, ": attention in f16 and bf16 (--attention)");
}

std::unique_ptr<SdpaPlan> make_sdpa_plan(Context& context, const Sdpa& sdpa) {
  return in_our_words([&] { return std::make_unique<FrontendPlan>(handle_of(context), context, sdpa); });
}

std::vector<std::string> sdpa_proposals(const Sdpa& sdpa, const std::string& properties, int compute_capability) {
  return in_our_words([&] {
    const auto device = std::make_shared<fe::DeviceProperties>();
    check(device->deserialize({properties.begin(), properties.end()}), "the properties of the device are not accepted");
    const std::unique_ptr<Graph> graph = graph_of(sdpa, compute_capability);
    graph->set_device_properties(device);
    propose(*graph, nullptr);
    std::vector<std::string> names(static_cast<size_t>(graph->get_execution_plan_count()));
    for (size_t i = 0; i < names.size(); ++i)
      check(graph->get_plan_name_at_index(static_cast<int64_t>(i), names[i]), "a plan has no name");
    return names;
  });
}

}  // namespace weft::cuda
