// The emulated device against what CUDA promises. The kernels are plain CUDA source.
#include "cuda_runtime.h"
// The emulation comes before everything else, as in a .cu file.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

namespace {

struct FreeDevice {
  void operator()(void* data) const { EXPECT_EQ(cudaFree(data), cudaSuccess); }
};
template <class T>
using DeviceArray = std::unique_ptr<T[], FreeDevice>;

template <class T>
DeviceArray<T> device_array(size_t count) {
  void* data = nullptr;
  EXPECT_EQ(cudaMalloc(&data, count * sizeof(T)), cudaSuccess);
  return DeviceArray<T>(static_cast<T*>(data));
}
template <class T>
DeviceArray<T> to_device(const std::vector<T>& values) {
  DeviceArray<T> array = device_array<T>(values.size());
  EXPECT_EQ(cudaMemcpy(array.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  return array;
}
template <class T>
std::vector<T> to_host(const DeviceArray<T>& array, size_t count) {
  std::vector<T> values(count);
  EXPECT_EQ(cudaMemcpy(values.data(), array.get(), count * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
  return values;
}

cudaLaunchConfig_t configure(dim3 grid, dim3 block, size_t shared_bytes = 0, cudaStream_t stream = nullptr) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return config;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Arguments... arguments) {
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// ---- threads and blocks ----

__global__ void write_place(uint4* place) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  place[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      make_uint4(block, threadIdx.x, threadIdx.y, threadIdx.z);
}

TEST(CudaEmulation, EveryThreadOfEveryBlockRunsOnce) {
  const dim3 grid(3, 2, 2), block(5, 3, 2);
  auto place = device_array<uint4>(12 * 30);
  ASSERT_EQ(launch(configure(grid, block), write_place, place.get()), cudaSuccess);
  const auto got = to_host(place, 12 * 30);
  for (unsigned i = 0; i < got.size(); ++i) {
    const unsigned thread = i % 30;
    EXPECT_EQ(got[i].x, i / 30);
    EXPECT_EQ(got[i].y, thread % 5);
    EXPECT_EQ(got[i].z, thread / 5 % 3);
    EXPECT_EQ(got[i].w, thread / 15);
  }
}

/// The sum of `count` values by one block, through shuffles within warps and shared memory between them.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float sums[32];
  for (int offset = warpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const unsigned warp = threadIdx.x / warpSize, lane = threadIdx.x % warpSize;
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  float total = 0;
  for (unsigned w = 0; w < blockDim.x / warpSize; ++w) total += sums[w];
  __syncthreads();
  return total;
}

__global__ void __launch_bounds__(256) sum_rows(const float* __restrict__ x, float* __restrict__ y, int columns) {
  float value = 0;
  for (int c = static_cast<int>(threadIdx.x); c < columns; c += static_cast<int>(blockDim.x)) {
    value += __ldg(&x[blockIdx.x * static_cast<unsigned>(columns) + c]);
  }
  value = block_sum(value);
  if (threadIdx.x == 0) y[blockIdx.x] = value;
}

TEST(CudaEmulation, ABlockReducesThroughShufflesAndSharedMemory) {
  constexpr int kRows = 9, kColumns = 1000;
  std::vector<float> x(kRows * kColumns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 97);  // sums are exact in any order
  auto device_x = to_device(x);
  auto y = device_array<float>(kRows);
  for (uint64_t seed = 0; seed < 20; ++seed) {
    weft_emulation::set_seed(seed);
    ASSERT_EQ(launch(configure(kRows, 256), sum_rows, device_x.get(), y.get(), kColumns), cudaSuccess);
    const auto got = to_host(y, kRows);
    for (int r = 0; r < kRows; ++r) {
      EXPECT_EQ(got[r], std::accumulate(x.begin() + r * kColumns, x.begin() + (r + 1) * kColumns, 0.0f));
    }
  }
}

/// Reverses a block's values through shared memory; without the barrier a thread may read what was not yet written.
template <bool kBarrier>
__global__ void reverse(int* values) {
  int* shared = reinterpret_cast<int*>(weft_emulation::dynamic_shared());
  shared[threadIdx.x] = values[threadIdx.x];
  if (kBarrier) __syncthreads();
  values[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

template <bool kBarrier>
int wrong_reversals() {
  std::vector<int> forward(64);
  std::iota(forward.begin(), forward.end(), 0);
  const std::vector<int> backward(forward.rbegin(), forward.rend());
  int wrong = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    weft_emulation::set_seed(seed);
    auto values = to_device(forward);
    EXPECT_EQ(launch(configure(1, 64, 64 * sizeof(int)), reverse<kBarrier>, values.get()), cudaSuccess);
    wrong += to_host(values, 64) != backward;
  }
  return wrong;
}

TEST(CudaEmulation, AMissingBarrierGivesWrongNumbers) {
  EXPECT_EQ(wrong_reversals<true>(), 0);
  EXPECT_EQ(wrong_reversals<false>(), 10);
}

__global__ void note_order(unsigned* order, unsigned* next) {
  if (threadIdx.x == 0) order[atomicAdd(next, 1u)] = blockIdx.x;
}

TEST(CudaEmulation, BlocksRunInAnOrderThatDependsOnTheSeed) {
  const auto order = [](uint64_t seed) {
    weft_emulation::set_seed(seed);
    auto order = device_array<unsigned>(50), next = to_device<unsigned>({0});
    EXPECT_EQ(launch(configure(50, 2), note_order, order.get(), next.get()), cudaSuccess);
    return to_host(order, 50);
  };
  auto first = order(1);
  EXPECT_EQ(first, order(1));
  EXPECT_NE(first, order(2));
  std::sort(first.begin(), first.end());
  for (unsigned i = 0; i < 50; ++i) EXPECT_EQ(first[i], i);
}

__global__ void count_even(int* results) {
  const bool even = threadIdx.x % 2 == 0;
  const int count = __syncthreads_count(even), all = __syncthreads_and(even), any = __syncthreads_or(threadIdx.x == 70);
  if (threadIdx.x >= 90) return;  // the others go on without these
  const int rest = __syncthreads_count(true);
  if (threadIdx.x == 5) {
    results[0] = count;
    results[1] = all;
    results[2] = any;
    results[3] = rest;
  }
}

TEST(CudaEmulation, BarriersCountAndAThreadThatHasExitedHoldsNobodyUp) {
  auto results = device_array<int>(4);
  ASSERT_EQ(launch(configure(1, 100), count_even, results.get()), cudaSuccess);
  EXPECT_EQ(to_host(results, 4), (std::vector<int>{50, 0, 1, 90}));
}

__global__ void wait_for_flag(int* flag, int* seen) {
  if (threadIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) __nanosleep(20);
    *seen = 1;
  } else {
    atomicExch(flag, 1);
  }
}

TEST(CudaEmulation, AThreadThatSleepsLetsOthersRun) {
  auto flag = to_device<int>({0}), seen = to_device<int>({0});
  ASSERT_EQ(launch(configure(1, 2), wait_for_flag, flag.get(), seen.get()), cudaSuccess);
  EXPECT_EQ(to_host(seen, 1)[0], 1);
}

// ---- warps ----

template <class T>
__global__ void shuffle(T* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const T value = static_cast<T>(lane + 100);
  out[lane] = __shfl_sync(~0u, value, 3);
  out[32 + lane] = __shfl_sync(~0u, value, 5, 8);
  out[64 + lane] = __shfl_up_sync(~0u, value, 2, 16);
  out[96 + lane] = __shfl_down_sync(~0u, value, 3, 8);
  out[128 + lane] = __shfl_xor_sync(~0u, value, 9);
  out[160 + lane] = __shfl_xor_sync(~0u, value, 4, 4);
}

template <class T>
void check_shuffle() {
  auto out = device_array<T>(192);
  ASSERT_EQ(launch(configure(1, 32), shuffle<T>, out.get()), cudaSuccess);
  const auto got = to_host(out, 192);
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT_EQ(got[lane], static_cast<T>(103));
    EXPECT_EQ(got[32 + lane], static_cast<T>(100 + lane / 8 * 8 + 5));
    EXPECT_EQ(got[64 + lane], static_cast<T>(100 + (lane % 16 < 2 ? lane : lane - 2)));
    EXPECT_EQ(got[96 + lane], static_cast<T>(100 + (lane % 8 + 3 >= 8 ? lane : lane + 3)));
    EXPECT_EQ(got[128 + lane], static_cast<T>(100 + (lane ^ 9)));
    // Out of its group of four a lane may read an earlier one, not a later one.
    EXPECT_EQ(got[160 + lane], static_cast<T>(100 + (lane & 4 ? lane ^ 4 : lane)));
  }
}

TEST(CudaEmulation, ShufflesMoveEveryTypeWithinGroups) {
  check_shuffle<int>();
  check_shuffle<unsigned>();
  check_shuffle<long long>();
  check_shuffle<unsigned long long>();
  check_shuffle<float>();
  check_shuffle<double>();
}

__global__ void vote(unsigned* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const unsigned ballot = __ballot_sync(~0u, lane % 3 == 0);
  const int any = __any_sync(~0u, lane == 31), all = __all_sync(~0u, lane < 31);
  const unsigned match = __match_any_sync(~0u, lane % 4);
  const int least = __reduce_min_sync(~0u, lane - 5), largest = __reduce_max_sync(~0u, -lane - 1);
  const unsigned sum = __reduce_add_sync(~0u, threadIdx.x);
  unsigned half = 0;
  if (lane < 16) half = __ballot_sync(0x0000ffffu, 1) + __activemask();
  __syncwarp();
  if (lane != 6) return;
  const unsigned values[] = {ballot,
                             static_cast<unsigned>(any),
                             static_cast<unsigned>(all),
                             match,
                             static_cast<unsigned>(least),
                             static_cast<unsigned>(largest),
                             sum,
                             half};
  for (int i = 0; i < 8; ++i) out[i] = values[i];
}

TEST(CudaEmulation, WarpsVoteMatchAndReduce) {
  auto out = device_array<unsigned>(8);
  ASSERT_EQ(launch(configure(1, 32), vote, out.get()), cudaSuccess);
  EXPECT_EQ(to_host(out, 8), (std::vector<unsigned>{0x49249249u, 1, 0, 0x44444444u, static_cast<unsigned>(-5),
                                                    static_cast<unsigned>(-1), 496, 0xfffeu}));
}

// ---- what CUDA leaves undefined ----

__global__ void diverge_at_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
  __syncthreads();
}
__global__ void barrier_against_warp(int* out) {
  if (threadIdx.x == 0)
    __syncthreads();
  else
    __syncwarp();
  out[threadIdx.x] = 1;
}
__global__ void shuffle_without_a_lane(int* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}
__global__ void disagree_on_mask(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __any_sync(0xffffffffu, 1) : __any_sync(0x7fffffffu, 1);
}
__global__ void write_past_end(int* out, int count) { out[count] = 1; }
__global__ void write_past_shared(int* out) {
  int* shared = reinterpret_cast<int*>(weft_emulation::dynamic_shared());
  shared[16] = out[0] = 1;
}
__global__ void trap(int*) { __trap(); }

void launch_and_stop(void (*kernel)(int*), unsigned threads) {
  auto out = device_array<int>(threads);
  (void)launch(configure(2, threads, 64), kernel, out.get());
}

TEST(CudaEmulationDeathTest, ABarrierThatNotAllThreadsReachEndsTheProcess) {
  EXPECT_DEATH(launch_and_stop(diverge_at_barrier, 64),
               "launch [0-9]+, block \\([01],0,0\\), thread .*a barrier must be one");
  EXPECT_DEATH(launch_and_stop(barrier_against_warp, 32), "no thread can go on");
}

TEST(CudaEmulationDeathTest, AWarpOperationWithoutOneOfItsLanesEndsTheProcess) {
  EXPECT_DEATH(launch_and_stop(shuffle_without_a_lane, 32), "has exited");
  EXPECT_DEATH(launch_and_stop(disagree_on_mask, 32),
               "__any_sync with mask 0x7fffffff|__any_sync with mask 0xffffffff");
  EXPECT_DEATH(launch_and_stop(trap, 1), "__trap");
}

TEST(CudaEmulationDeathTest, AWriteOutsideAnAllocationEndsTheProcess) {
  const auto overrun = [](int index) {
    auto out = device_array<int>(10);
    (void)launch(configure(1, 1), write_past_end, out.get(), index);
  };
  EXPECT_DEATH(overrun(10), "guard bytes of an allocation of 40 bytes.*0 bytes from its end|use-after-poison");
  EXPECT_DEATH(overrun(-1), "guard bytes of an allocation of 40 bytes.*4 bytes from its start|use-after-poison");
  EXPECT_DEATH(launch_and_stop(write_past_shared, 1),
               "past the end of its 64 bytes of dynamic shared|use-after-poison");
}

// ---- the runtime ----

TEST(CudaEmulation, ALaunchThatTheDeviceCannotRunIsRefused) {
  auto values = device_array<int>(64);
  const auto refused = [&](const cudaLaunchConfig_t& config) {
    const cudaError_t error = launch(config, reverse<true>, values.get());
    EXPECT_EQ(cudaPeekAtLastError(), error);
    EXPECT_EQ(cudaGetLastError(), error);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    return error;
  };
  EXPECT_EQ(refused(configure(1, 1025)), cudaErrorInvalidConfiguration);
  EXPECT_EQ(refused(configure(1, dim3(32, 33))), cudaErrorInvalidConfiguration);
  EXPECT_EQ(refused(configure(1, dim3(1, 1, 65))), cudaErrorInvalidConfiguration);
  EXPECT_EQ(refused(configure(0, 1)), cudaErrorInvalidConfiguration);
  EXPECT_EQ(refused(configure(1, 0)), cudaErrorInvalidConfiguration);
  EXPECT_EQ(refused(configure(dim3(1, 65536), 1)), cudaErrorInvalidConfiguration);
  EXPECT_EQ(refused(configure(dim3(1, 1, 65536), 1)), cudaErrorInvalidConfiguration);
  EXPECT_EQ(refused(configure(1, 64, 48 * 1024 + 1)), cudaErrorInvalidValue);
  EXPECT_EQ(refused(configure(1, 64, 48 * 1024)), cudaSuccess);

  ASSERT_EQ(cudaFuncSetAttribute(reverse<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * 1024), cudaSuccess);
  EXPECT_EQ(refused(configure(1, 64, 100 * 1024)), cudaSuccess);
  EXPECT_EQ(refused(configure(1, 64, 100 * 1024 + 1)), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFuncSetAttribute(reverse<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024 + 1),
            cudaErrorInvalidValue);
  EXPECT_STREQ(cudaGetErrorName(cudaGetLastError()), "cudaErrorInvalidValue");
  ASSERT_EQ(cudaFuncSetAttribute(reverse<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, 48 * 1024), cudaSuccess);
  EXPECT_STREQ(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory");
}

TEST(CudaEmulation, MemoryIsCountedFilledWithNaNAndLimited) {
  size_t before = 0, during = 0, after = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
  {
    auto values = device_array<float>(1000);
    EXPECT_TRUE(std::isnan(values[0]) && std::isnan(values[999]));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(values.get()) % 256, 0u);
    ASSERT_EQ(cudaMemGetInfo(&during, &total), cudaSuccess);
  }
  ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  EXPECT_EQ(before - during, 4000u);
  EXPECT_EQ(before, after);
  void* data = nullptr;
  EXPECT_EQ(cudaMalloc(&data, total + 1), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaFree(&data), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFree(nullptr), cudaSuccess);
  cudaGetLastError();
}

TEST(CudaEmulation, PinnedMemoryHasADeviceAddress) {
  void *pinned = nullptr, *on_device = nullptr;
  ASSERT_EQ(cudaHostAlloc(&pinned, 64, cudaHostAllocMapped), cudaSuccess);
  EXPECT_EQ(cudaHostGetDevicePointer(&on_device, pinned, 0), cudaSuccess);
  EXPECT_EQ(on_device, pinned);
  int local = 0;
  EXPECT_EQ(cudaHostGetDevicePointer(&on_device, &local, 0), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
  cudaGetLastError();
}

__global__ void accumulate(const float* x, float* total, float factor) {
  const float sum = block_sum(x[threadIdx.x]);
  if (threadIdx.x == 0) atomicAdd(total, factor * sum);
}

TEST(CudaEmulation, ThreadsLaunchAtTheSameTime) {
  auto ones = to_device(std::vector<float>(128, 1));
  auto total = to_device<float>({0});
  const auto work = [&] {
    cudaStream_t stream = nullptr;
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    for (int i = 0; i < 200; ++i) {
      EXPECT_EQ(launch(configure(2, 128, 0, stream), accumulate, ones.get(), total.get(), 1.0f), cudaSuccess);
    }
    EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  };
  std::thread other(work);
  work();
  other.join();
  EXPECT_EQ(to_host(total, 1)[0], 2 * 200 * 2 * 128);
}

// ---- what is left for later ----

class CudaLate : public testing::Test {
 protected:
  void SetUp() override {
    for (cudaStream_t* stream : {&work_, &copies_})
      ASSERT_EQ(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_EQ(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), cudaSuccess);
    ASSERT_EQ(cudaMallocHost(reinterpret_cast<void**>(&host_), kBytes), cudaSuccess);
    std::fill_n(host_, kCount, 3.0f);
  }
  void TearDown() override {
    EXPECT_EQ(cudaStreamDestroy(work_), cudaSuccess);
    EXPECT_EQ(cudaStreamDestroy(copies_), cudaSuccess);
    EXPECT_EQ(cudaEventDestroy(event_), cudaSuccess);
    EXPECT_EQ(cudaFreeHost(host_), cudaSuccess);
    weft_emulation::set_late(weft_emulation::Late::kCopies);
  }
  void copy_in(float* to) {
    ASSERT_EQ(cudaMemcpyAsync(to, host_, kBytes, cudaMemcpyHostToDevice, copies_), cudaSuccess);
  }
  void add_up(const float* x, float* total) {
    ASSERT_EQ(launch(configure(1, kCount, 0, work_), accumulate, x, total, 1.0f), cudaSuccess);
  }
  void order(cudaStream_t first, cudaStream_t second) {
    ASSERT_EQ(cudaEventRecord(event_, first), cudaSuccess);
    ASSERT_EQ(cudaStreamWaitEvent(second, event_), cudaSuccess);
  }

  static constexpr int kCount = 64;
  static constexpr size_t kBytes = kCount * sizeof(float);
  cudaStream_t work_ = nullptr, copies_ = nullptr;
  cudaEvent_t event_ = nullptr;
  float* host_ = nullptr;
};

TEST_F(CudaLate, AKernelThatDoesNotWaitForACopyReadsWhatWasThereBefore) {
  auto x = to_device(std::vector<float>(kCount, 1));
  auto total = to_device<float>({0});
  copy_in(x.get());
  add_up(x.get(), total.get());
  EXPECT_EQ(to_host(total, 1)[0], kCount) << "the wait is missing";
  order(copies_, work_);
  add_up(x.get(), total.get());
  EXPECT_EQ(to_host(total, 1)[0], kCount + 3 * kCount);
}

TEST_F(CudaLate, AKernelThatDoesNotWaitOverwritesWhatACopyHasYetToRead) {
  auto x = to_device(std::vector<float>(kCount, 1));
  ASSERT_EQ(cudaMemcpyAsync(host_, x.get(), kBytes, cudaMemcpyDeviceToHost, copies_), cudaSuccess);
  ASSERT_EQ(cudaMemsetAsync(x.get(), 0, kBytes, work_), cudaSuccess);
  ASSERT_EQ(cudaStreamSynchronize(copies_), cudaSuccess);
  EXPECT_EQ(host_[0], 0);
}

TEST_F(CudaLate, ACopyThatDoesNotWaitForAKernelIsAheadOfIt) {
  weft_emulation::set_late(weft_emulation::Late::kKernels);
  auto x = to_device(std::vector<float>(kCount, 1));
  auto total = to_device<float>({0});
  add_up(x.get(), total.get());
  copy_in(x.get());
  ASSERT_EQ(cudaStreamSynchronize(work_), cudaSuccess);
  EXPECT_EQ(to_host(total, 1)[0], 3 * kCount) << "the wait is missing";
  std::fill_n(host_, kCount, 5.0f);
  add_up(x.get(), total.get());
  order(work_, copies_);
  copy_in(x.get());
  EXPECT_EQ(to_host(total, 1)[0], 3 * kCount + 3 * kCount) << "the copy made the kernel before it run";
}

TEST_F(CudaLate, CopiesOfPageableMemoryDoNotOutliveTheCall) {
  auto x = to_device(std::vector<float>(kCount, 1));
  std::vector<float> values(kCount, 7);
  ASSERT_EQ(cudaMemcpyAsync(x.get(), values.data(), kBytes, cudaMemcpyHostToDevice, copies_), cudaSuccess);
  values.assign(kCount, 0);
  ASSERT_EQ(cudaMemcpyAsync(values.data(), x.get(), kBytes, cudaMemcpyDeviceToHost, copies_), cudaSuccess);
  EXPECT_EQ(values[kCount - 1], 7);
}

// ---- capture ----

class CudaCapture : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_EQ(cudaStreamCreateWithFlags(&other_, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_EQ(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), cudaSuccess);
  }
  void TearDown() override {
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamDestroy(other_), cudaSuccess);
    EXPECT_EQ(cudaEventDestroy(event_), cudaSuccess);
    cudaGetLastError();
  }
  void begin() { ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), cudaSuccess); }
  cudaError_t end() {
    const cudaError_t error = cudaStreamEndCapture(stream_, &graph_);
    if (graph_ != nullptr) {
      EXPECT_EQ(cudaGraphDestroy(graph_), cudaSuccess);
    }
    return error;
  }

  cudaStream_t stream_ = nullptr, other_ = nullptr;
  cudaEvent_t event_ = nullptr;
  cudaGraph_t graph_ = nullptr;
};

TEST_F(CudaCapture, AGraphReplaysOnWhatTheMemoryHoldsThen) {
  auto x = to_device(std::vector<float>(64, 1));
  auto total = to_device<float>({5});
  begin();
  EXPECT_EQ(cudaMemsetAsync(total.get(), 0, sizeof(float), stream_), cudaSuccess);
  float factor = 2;
  EXPECT_EQ(launch(configure(1, 64, 0, stream_), accumulate, x.get(), total.get(), factor), cudaSuccess);
  factor = 100;  // the graph has its own copy of the arguments
  cudaStreamCaptureStatus status;
  EXPECT_EQ(cudaStreamIsCapturing(stream_, &status), cudaSuccess);
  EXPECT_EQ(status, cudaStreamCaptureStatusActive);
  ASSERT_EQ(cudaStreamEndCapture(stream_, &graph_), cudaSuccess);
  EXPECT_EQ(to_host(total, 1)[0], 5);  // nothing ran yet

  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph_), cudaSuccess);
  ASSERT_EQ(cudaGraphDestroy(graph_), cudaSuccess);
  for (const float value : {1.0f, 3.0f}) {
    std::fill_n(x.get(), 64, value);
    ASSERT_EQ(cudaGraphLaunch(executable, stream_), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    EXPECT_EQ(to_host(total, 1)[0], 2 * 64 * value);
  }
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
}

TEST_F(CudaCapture, CallsThatWaitOrAllocateSpoilIt) {
  auto values = device_array<int>(4);
  void* data = nullptr;
  const auto spoils = [&](auto call, cudaError_t expected) {
    begin();
    EXPECT_EQ(call(), expected);
    EXPECT_EQ(cudaMemsetAsync(values.get(), 0, 4, stream_), cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(cudaMemsetAsync(values.get(), 0, 4, stream_), cudaSuccess);
  };
  spoils([&] { return cudaStreamSynchronize(stream_); }, cudaErrorStreamCaptureUnsupported);
  spoils([&] { return cudaDeviceSynchronize(); }, cudaErrorStreamCaptureUnsupported);
  spoils([&] { return cudaMalloc(&data, 4); }, cudaErrorStreamCaptureUnsupported);
  spoils([&] { return cudaMemcpy(values.get(), values.get() + 1, 4, cudaMemcpyDeviceToDevice); },
         cudaErrorStreamCaptureUnsupported);
  spoils([&] { return cudaEventRecord(event_, stream_), cudaEventQuery(event_); }, cudaErrorCapturedEvent);
}

TEST_F(CudaCapture, AThreadMayAllowItselfCallsThatAllocate) {
  begin();
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  ASSERT_EQ(cudaThreadExchangeStreamCaptureMode(&mode), cudaSuccess);
  EXPECT_EQ(mode, cudaStreamCaptureModeGlobal);
  void* data = nullptr;
  EXPECT_EQ(cudaMalloc(&data, 4), cudaSuccess);
  ASSERT_EQ(cudaThreadExchangeStreamCaptureMode(&mode), cudaSuccess);
  EXPECT_EQ(mode, cudaStreamCaptureModeRelaxed);
  EXPECT_EQ(end(), cudaSuccess);
  EXPECT_EQ(cudaFree(data), cudaSuccess);
}

TEST_F(CudaCapture, ForksMustBeJoined) {
  auto values = to_device<int>({7, 7});
  const auto fork = [&] {
    begin();
    EXPECT_EQ(cudaEventRecord(event_, stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamWaitEvent(other_, event_), cudaSuccess);
    EXPECT_EQ(cudaMemsetAsync(values.get(), 0, sizeof(int), other_), cudaSuccess);
    EXPECT_EQ(values[0], 7);
  };
  fork();
  EXPECT_EQ(end(), cudaErrorStreamCaptureUnjoined);
  fork();
  EXPECT_EQ(cudaEventRecord(event_, other_), cudaSuccess);
  EXPECT_EQ(cudaStreamWaitEvent(stream_, event_), cudaSuccess);
  EXPECT_EQ(end(), cudaSuccess);
}

TEST_F(CudaCapture, WaitingForWorkOutsideSpoilsIt) {
  EXPECT_EQ(cudaEventRecord(event_, other_), cudaSuccess);
  begin();
  EXPECT_EQ(cudaStreamWaitEvent(stream_, event_), cudaErrorStreamCaptureIsolation);
  EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
}

}  // namespace
