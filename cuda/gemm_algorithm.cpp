#include "cuda/gemm_algorithm.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "core/backend.h"
#include "core/error.h"
#include "cuda/cublaslt_library.h"
#include "cuda/error.h"
#include "cuda/event.h"
#include "cuda/library_version.h"
#include "ops/gemm_algorithms.h"

namespace weft {
namespace cuda {
namespace {

using Algorithm = cublasLtMatmulAlgo_t;

constexpr int kMostCandidates = 32;

void check(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fail(ErrorKind::kDevice, "gemm", call, ": ", cublaslt().GetStatusName(status), ": ",
       cublaslt().GetStatusString(status));
}

/// The choices of one device.
struct Choices {
  std::map<std::string, Algorithm> given;
  std::string from;  ///< where they were read; empty: none were given
  GemmAlgorithmUse use;
  const std::function<void(const GemmAlgorithm&)>* tuning = nullptr;  ///< where choices go that are made now
};

std::mutex& mutex() {
  static std::mutex& it = *new std::mutex;
  return it;
}
Choices& choices_of(int device) {
  static auto& all = *new std::map<int, Choices>;
  return all[device];
}
std::atomic<int64_t> epoch = 0;

// ---- descriptions in hexadecimal digits ----

std::string to_hex(const Algorithm& algorithm) {
  static constexpr char kDigits[] = "0123456789abcdef";
  unsigned char bytes[sizeof algorithm];
  std::memcpy(bytes, &algorithm, sizeof algorithm);
  std::string text;
  for (const unsigned char byte : bytes) text += {kDigits[byte >> 4], kDigits[byte & 15]};
  return text;
}

Algorithm from_hex(const GemmAlgorithm& given, const std::string& from) {
  constexpr size_t kSize = sizeof(Algorithm);
  const std::string& text = given.algorithm;
  if (text.size() != 2 * kSize || text.find_first_not_of("0123456789abcdef") != std::string::npos) {
    fail(ErrorKind::kData, "gemm algorithms", from, ": the algorithm of \"", given.product, "\" must be ", 2 * kSize,
         " hexadecimal digits, got ", text.size(), " characters: ", quoted(text));
  }
  unsigned char bytes[kSize];
  const auto value = [](char c) { return static_cast<unsigned>(c <= '9' ? c - '0' : c - 'a' + 10); };
  for (size_t i = 0; i < kSize; ++i)
    bytes[i] = static_cast<unsigned char>(value(text[2 * i]) << 4 | value(text[2 * i + 1]));
  Algorithm algorithm;
  std::memcpy(&algorithm, bytes, kSize);
  return algorithm;
}

// ---- candidates ----

/// The library's proposals, best first by its own estimate.
std::vector<Algorithm> proposals(Context& context, const GemmCall& call, int most, uint32_t reductions) {
  cublasLtMatmulPreference_t made = nullptr;
  check(cublaslt().MatmulPreferenceCreate(&made), "cublasLtMatmulPreferenceCreate");
  const std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>, decltype(CublasLt::MatmulPreferenceDestroy)>
      preference(made, cublaslt().MatmulPreferenceDestroy);
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check(cublaslt().MatmulPreferenceSetAttribute(made, attribute, &value, sizeof value),
          "cublasLtMatmulPreferenceSetAttribute");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, size_t{Context::kWorkspace});
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, call.alignment[0]);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, call.alignment[1]);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, call.alignment[2]);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, call.alignment[2]);
  std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<size_t>(most));
  int count = 0;
  const cublasStatus_t status = cublaslt().MatmulAlgoGetHeuristic(context.blas, call.product, call.a, call.b, call.c,
                                                                  call.c, made, most, results.data(), &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return {};
  check(status, "cublasLtMatmulAlgoGetHeuristic");
  std::vector<Algorithm> found;
  for (int i = 0; i < count; ++i) {
    if (results[static_cast<size_t>(i)].state == CUBLAS_STATUS_SUCCESS)
      found.push_back(results[static_cast<size_t>(i)].algo);
  }
  return found;
}

Algorithm first_choice(Context& context, const GemmCall& call) {
  const std::vector<Algorithm> found = proposals(context, call, 1, CUBLASLT_REDUCTION_SCHEME_MASK);
  if (found.empty()) fail(ErrorKind::kDevice, "gemm", "cuBLASLt has no algorithm for this product");
  return found.front();
}

/// Whether every element is summed in one sequence.
bool in_one_sequence(const Algorithm& algorithm) {
  uint32_t scheme = 0;
  int32_t parts = 1;
  size_t written = 0;
  check(cublaslt().MatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme,
                                                sizeof scheme, &written),
        "cublasLtMatmulAlgoConfigGetAttribute");
  check(cublaslt().MatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts, sizeof parts,
                                                &written),
        "cublasLtMatmulAlgoConfigGetAttribute");
  return scheme == CUBLASLT_REDUCTION_SCHEME_NONE && parts <= 1;
}

// ---- timing ----

/// Memory of the device for as long as a product is timed.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes == 0) return;
    WEFT_CUDA(cudaMalloc(&data_, bytes));
    WEFT_CUDA(cudaMemset(data_, 0, bytes));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { cudaFree(data_); }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

/// Seconds of one of `calls` calls.
double seconds_of(Context& context, const GemmCall& call, void* c, const Algorithm& algorithm, int calls) {
  const Event begin, end;
  WEFT_CUDA(cudaEventRecord(begin.get(), context.stream));
  for (int i = 0; i < calls; ++i) {
    check(cublaslt().Matmul(context.blas, call.product, call.alpha, call.a_data, call.a, call.b_data, call.b, call.beta,
                            c, call.c, c, call.c, &algorithm, context.workspace, Context::kWorkspace, context.stream),
          "cublasLtMatmul");
  }
  WEFT_CUDA(cudaEventRecord(end.get(), context.stream));
  context.synchronize();
  return begin.seconds_until(end) / calls;
}

Algorithm tuned(Context& context, const std::string& name, const GemmCall& call, Choices& choices) {
  constexpr int kRounds = 5, kMostCalls = 100;
  constexpr double kRound = 1e-3, kNoise = 0.99;
  std::vector<Algorithm> candidates = {first_choice(context, call)};
  const std::string first = to_hex(candidates.front());
  for (const Algorithm& each : proposals(context, call, kMostCandidates, CUBLASLT_REDUCTION_SCHEME_NONE)) {
    if (in_one_sequence(each) && to_hex(each) != first) candidates.push_back(each);
  }
  // A C that is added to must not change; one that is not is written anew by the chosen one.
  const Scratch scratch(call.accumulates ? call.c_bytes : 0);
  void* const c = call.accumulates ? scratch.data() : call.c_data;
  std::vector<std::vector<double>> seconds(candidates.size());
  std::vector<int> calls;
  for (const Algorithm& each : candidates) {
    const double once = std::min(seconds_of(context, call, c, each, 1), seconds_of(context, call, c, each, 1));
    calls.push_back(static_cast<int>(std::clamp(kRound / std::max(once, 1e-9), 1.0, double{kMostCalls})));
  }
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < candidates.size(); ++i)
      seconds[i].push_back(seconds_of(context, call, c, candidates[i], calls[i]));
  }
  size_t best = 0;
  std::vector<double> medians;
  for (std::vector<double>& each : seconds) {
    std::sort(each.begin(), each.end());
    medians.push_back(each[kRounds / 2]);
    const size_t i = medians.size() - 1;
    if (medians[i] < medians[best] * (best == 0 ? kNoise : 1)) best = i;
  }
  (*choices.tuning)({.product = name,
                     .algorithm = to_hex(candidates[best]),
                     .seconds = medians[best],
                     .first_choice_seconds = medians[0],
                     .flops = call.flops,
                     .candidates = static_cast<int64_t>(candidates.size())});
  return candidates[best];
}

}  // namespace

int64_t gemm_algorithm_epoch() { return epoch; }

bool has_gemm_algorithm(Context& context, const GemmCall& call) {
  return !proposals(context, call, 1, CUBLASLT_REDUCTION_SCHEME_MASK).empty();
}

Algorithm choose_gemm_algorithm(Context& context, const std::string& name, const GemmCall& call) {
  const std::lock_guard lock(mutex());
  Choices& choices = choices_of(context.index);
  if (choices.tuning != nullptr) return tuned(context, name, call, choices);
  if (choices.from.empty()) return first_choice(context, call);
  const auto found = choices.given.find(name);
  if (found == choices.given.end()) {
    choices.use.missing.push_back(name);
    return first_choice(context, call);
  }
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t status =
      cublaslt().MatmulAlgoCheck(context.blas, call.product, call.a, call.b, call.c, call.c, &found->second, &result);
  if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > Context::kWorkspace) {
    fail(ErrorKind::kData, "gemm algorithms", choices.from, ": cuBLASLt does not accept the algorithm of \"", name,
         "\" (", cublaslt().GetStatusName(status), ", ", result.workspaceSize, " bytes of workspace, of ",
         Context::kWorkspace, "). Hint: tune again: weft bench gemm --tune FILE");
  }
  ++choices.use.found;
  return found->second;
}

}  // namespace cuda

GemmLibrary gemm_library(Device device) { return {backend(device).name(), "cuBLASLt " + cuda::cublaslt_version()}; }

void use_gemm_algorithms(Device device, std::span<const GemmAlgorithm> algorithms, const std::string& from) {
  std::map<std::string, cublasLtMatmulAlgo_t> given;
  for (const GemmAlgorithm& each : algorithms) {
    if (!given.emplace(each.product, cuda::from_hex(each, from)).second)
      fail(ErrorKind::kData, "gemm algorithms", from, ": two algorithms for \"", each.product, "\"");
  }
  const std::lock_guard lock(cuda::mutex());
  cuda::Choices& choices = cuda::choices_of(device.index);
  choices.given = std::move(given);
  choices.from = algorithms.empty() ? "" : from;
  choices.use = {};
  ++cuda::epoch;
}

GemmAlgorithmUse gemm_algorithm_use(Device device) {
  const std::lock_guard lock(cuda::mutex());
  return cuda::choices_of(device.index).use;
}

std::vector<GemmAlgorithm> tune_gemm(Device device, const std::function<void()>& work,
                                     const std::function<void(const GemmAlgorithm&)>& chosen) {
  std::vector<GemmAlgorithm> all;
  const std::function<void(const GemmAlgorithm&)> take = [&](const GemmAlgorithm& each) {
    all.push_back(each);
    chosen(each);
  };
  const auto set = [device](const std::function<void(const GemmAlgorithm&)>* tuning) {
    const std::lock_guard lock(cuda::mutex());
    cuda::choices_of(device.index).tuning = tuning;
    ++cuda::epoch;
  };
  set(&take);
  const std::unique_ptr<const void, std::function<void(const void*)>> end(&take, [&](const void*) { set(nullptr); });
  work();
  backend(device).synchronize();
  return all;
}

}  // namespace weft
