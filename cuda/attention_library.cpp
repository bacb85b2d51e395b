// Which kernels compute attention: our own, or cuDNN's.
#include "ops/attention_library.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>

#include "core/backend.h"
#include "core/error.h"
#include "core/memory.h"
#include "core/tensor.h"
#include "cuda/attention_library.h"
#include "cuda/context.h"
#include "cuda/cudnn_sdpa.h"

namespace weft {
namespace cuda {
namespace {

/// What vector loads of cuDNN's need, in bytes.
constexpr int64_t kAlignment = 16;

/// A plan, or why there is none.
struct Planned {
  std::unique_ptr<SdpaPlan> plan;
  std::string why_not;
};

/// The choice of one device.
struct Chosen {
  AttentionChoice choice = AttentionChoice::flash;
  std::string why_no_cudnn;  ///< as it was found when it was chosen
  AttentionUse use;
  std::map<Sdpa, Planned> plans;
};

/// Held while plans are made and run, too: a handle of cuDNN's is for one thread at a time.
std::mutex& mutex() {
  static std::mutex& it = *new std::mutex;
  return it;
}
Chosen& chosen_of(int device) {
  static auto& all = *new std::map<int, Chosen>;
  return all[device];
}

/// Whether a sequence attends to itself as a whole: what there is a choice for.
bool is_whole(const AttentionShape& s) {
  return s.queries == s.keys && s.query_offset == 0 && s.batch * s.heads * s.queries > 0;
}

Sdpa sdpa_of(const AttentionShape& s, DType dtype, bool backward) {
  Sdpa sdpa;
  sdpa.backward = backward, sdpa.dtype = dtype;
  sdpa.batch = s.batch, sdpa.heads = s.heads, sdpa.kv_heads = s.kv_heads;
  sdpa.tokens = s.queries, sdpa.head_size = s.head_size;
  sdpa.causal = s.causal, sdpa.scale = s.scale;
  return sdpa;
}

/// A pass and the memory that it is called with.
struct Call {
  Sdpa sdpa;
  SdpaPointers pointers{};
  bool aligned = true;

  template <class View>
  void add(SdpaTensor which, const View& view) {
    // One batch lies as far from the next as its tokens reach, whatever its stride says.
    const int64_t batch = sdpa.batch == 1 ? sdpa.tokens * view.token : view.batch;
    sdpa.strides[which] = {batch, view.head, view.token};
    pointers[which] = const_cast<void*>(static_cast<const void*>(view.data));
    constexpr int64_t kElement = sizeof(*view.data);
    aligned = aligned && reinterpret_cast<uintptr_t>(view.data) % kAlignment == 0 &&
              (batch | view.head | view.token) * kElement % kAlignment == 0;
  }
};

/// Why cuDNN is not asked for a plan; "" if it is.
std::string why_not_asked(const Chosen& chosen, const Sdpa& s, bool in_parts, bool aligned) {
  if (s.dtype != DType::bf16 && s.dtype != DType::f16)
    return concat("cuDNN's attention is for f16 and bf16, this is in ", s.dtype);
  if (in_parts) return "the keys come in parts (context parallelism), which only our own kernels add up unrounded";
  if (!aligned)
    return concat("q, k, v or a result does not lie in steps of ", kAlignment, " bytes; heads are of ", s.head_size,
                  " columns");
  if (chosen.choice == AttentionChoice::automatic && s.tokens < kAttentionAutomaticFrom)
    return concat("fewer than ", kAttentionAutomaticFrom, " tokens are not worth a plan of cuDNN's");
  return chosen.why_no_cudnn;
}

/// The plan for the pass, made if it is not there, or why there is none.
const Planned& planned(Context& context, Chosen& chosen, const Sdpa& sdpa) {
  if (const auto found = chosen.plans.find(sdpa); found != chosen.plans.end()) return found->second;
  context.refuse_while_capturing("asks cuDNN for a plan of attention");
  Planned made;
  try {
    made.plan = make_sdpa_plan(context, sdpa);
  } catch (const Error& error) {
    made.why_not = error.what();
  }
  return chosen.plans.emplace(sdpa, std::move(made)).first->second;
}

/// Runs the pass by cuDNN if it is chosen. @param in_parts  see why_not_asked()
bool run(Cuda device, const AttentionShape& shape, const Call& call, bool in_parts) {
  if (!in_parts && !is_whole(shape)) return false;
  Context& context = current_context();
  const std::lock_guard lock(mutex());
  Chosen& chosen = chosen_of(context.index);
  if (chosen.choice == AttentionChoice::flash) {
    ++chosen.use.own;
    return false;
  }
  const Planned* plan = nullptr;
  std::string why = why_not_asked(chosen, call.sdpa, in_parts, call.aligned);
  if (why.empty()) {
    plan = &planned(context, chosen, call.sdpa);
    why = plan->why_not;
  }
  if (!why.empty()) {
    if (chosen.choice == AttentionChoice::cudnn)
      fail(ErrorKind::kDevice, device.op, "attention by cuDNN was asked for and cannot be had: ", why,
           ". Hint: --attention auto, which takes our own kernels here");
    std::vector<std::string>& reasons = chosen.use.why_own;
    if (std::find(reasons.begin(), reasons.end(), why) == reasons.end()) reasons.push_back(why);
    ++chosen.use.own;
    return false;
  }
  std::optional<Tensor> workspace;
  if (plan->plan->workspace > 0) {
    const MemoryScope scope(MemoryCategory::workspace);
    workspace = Tensor::empty({static_cast<int64_t>(plan->plan->workspace)}, DType::u8, Device::cuda(context.index));
  }
  plan->plan->run(call.pointers, workspace ? workspace->raw() : nullptr);
  ++chosen.use.cudnn;
  return true;
}

/// The pass of causal_attention() over packed q, k and v.
Sdpa packed_pass(const AttentionShape& s, DType dtype, bool backward) {
  Sdpa sdpa = sdpa_of(s, dtype, backward);
  const int64_t channels = s.heads * s.head_size, row = 3 * channels;
  const Sdpa::Strides packed{s.queries * row, s.head_size, row}, plain{s.queries * channels, s.head_size, channels};
  for (const SdpaTensor each : {kQ, kK, kV}) sdpa.strides[each] = packed;
  sdpa.strides[kOut] = plain;
  if (!backward) return sdpa;
  sdpa.strides[kDout] = plain;
  for (const SdpaTensor each : {kDq, kDk, kDv}) sdpa.strides[each] = packed;
  return sdpa;
}

}  // namespace

template <class T>
bool library_attention(Cuda device, const AttentionForward<T>& a) {
  Call call{.sdpa = sdpa_of(a.shape, DTypeOf<T>::value, false)};
  call.add(kQ, a.q);
  call.add(kK, a.k);
  call.add(kV, a.v);
  call.add(kOut, a.out);
  call.pointers[kLse] = a.lse;
  return run(device, a.shape, call, a.so_far.data != nullptr);
}

template <class T>
bool library_attention(Cuda device, const AttentionBackward<T>& a) {
  Call call{.sdpa = sdpa_of(a.shape, DTypeOf<T>::value, true)};
  call.add(kQ, a.q);
  call.add(kK, a.k);
  call.add(kV, a.v);
  call.add(kOut, a.out);
  call.add(kDout, a.dout);
  call.add(kDq, a.dq);
  call.add(kDk, a.dk);
  call.add(kDv, a.dv);
  call.pointers[kLse] = const_cast<Accumulate<T>*>(a.lse);
  return run(device, a.shape, call, a.dq_sum.data != nullptr);
}

#define WEFT_INSTANCE(T)                                             \
  template bool library_attention(Cuda, const AttentionForward<T>&); \
  template bool library_attention(Cuda, const AttentionBackward<T>&)
WEFT_INSTANCE(float);
WEFT_INSTANCE(double);
WEFT_INSTANCE(Half);
WEFT_INSTANCE(BFloat16);
#undef WEFT_INSTANCE

}  // namespace cuda

void use_attention(Device device, AttentionChoice choice) {
  backend(device).use();
  const std::string why = choice == AttentionChoice::flash ? "" : cuda::why_no_cudnn();
  if (choice == AttentionChoice::cudnn && !why.empty()) {
    fail(ErrorKind::kDevice, "attention", "cuDNN was asked for and cannot be had: ", why,
         ". Hint: --attention auto, which takes our own kernels here");
  }
  const std::lock_guard lock(cuda::mutex());
  cuda::Chosen& chosen = cuda::chosen_of(device.index);
  chosen.choice = choice;
  chosen.why_no_cudnn = why;
}

AttentionUse attention_use(Device device) {
  const std::lock_guard lock(cuda::mutex());
  return cuda::chosen_of(device.index).use;
}

std::string describe_attention(Device device, const AttentionShape& shape, DType dtype) {
  backend(device).use();
  const std::lock_guard lock(cuda::mutex());
  cuda::Chosen& chosen = cuda::chosen_of(device.index);
  if (chosen.choice == AttentionChoice::flash) return "our own kernels";
  std::string why[2];
  for (const bool backward : {false, true}) {
    const cuda::Sdpa pass = cuda::packed_pass(shape, dtype, backward);
    const bool aligned = shape.head_size * static_cast<int64_t>(size_of(dtype)) % cuda::kAlignment == 0;
    why[backward] = cuda::why_not_asked(chosen, pass, false, aligned);
    if (why[backward].empty()) why[backward] = cuda::planned(cuda::current_context(), chosen, pass).why_not;
  }
  if (!why[0].empty()) return concat("our own kernels: ", why[0]);
  return concat("cuDNN ", cuda::cudnn_version(),
                why[1].empty() ? "" : concat(", backward by our own kernels: ", why[1]));
}

}  // namespace weft
