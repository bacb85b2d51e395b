// Allocations, each between two strips of guard bytes.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "block.h"
#include "emulation.h"
#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace weft_emulation {
namespace {

constexpr size_t kAlignment = 512, kGuard = 512;
// Not 0xff, which is what fresh memory holds: a NaN copied over the end must be seen.
constexpr unsigned char kGuardByte = 0xf5;

struct Allocation {
  size_t bytes;
  bool on_host;
};

std::mutex mutex;
size_t total = size_t{4} << 30, used = 0;
std::map<unsigned char*, Allocation>& allocations() {
  static auto* all = new std::map<unsigned char*, Allocation>;  // outlives every static that frees memory
  return *all;
}

void set_guard([[maybe_unused]] unsigned char* guard) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(guard, kGuard);
#else
  std::memset(guard, kGuardByte, kGuard);
#endif
}

void check_guard([[maybe_unused]] const unsigned char* guard, [[maybe_unused]] const unsigned char* data,
                 [[maybe_unused]] const Allocation& allocation) {
#if !defined(__SANITIZE_ADDRESS__)
  const unsigned char* changed =
      std::find_if(guard, guard + kGuard, [](unsigned char byte) { return byte != kGuardByte; });
  if (changed == guard + kGuard) return;
  die("the guard bytes of an allocation of %zu bytes at %p were overwritten, the first one %td bytes from its %s",
      allocation.bytes, static_cast<const void*>(data),
      guard < data ? data - changed : changed - data - static_cast<ptrdiff_t>(allocation.bytes),
      guard < data ? "start" : "end");
#endif
}

void check(const unsigned char* data, const Allocation& allocation) {
  check_guard(data - kGuard, data, allocation);
  check_guard(data + allocation.bytes, data, allocation);
}

cudaError_t allocate(void** data, size_t bytes, bool on_host) {
  if (data == nullptr) return result(cudaErrorInvalidValue);
  *data = nullptr;
  if (const cudaError_t error = refuse_while_capturing(); error != cudaSuccess) return result(error);
  if (bytes == 0) return cudaSuccess;
  const std::lock_guard lock(mutex);
  if (!on_host && bytes > std::max(total, used) - used) return result(cudaErrorMemoryAllocation);
  const size_t whole = (bytes + 2 * kGuard + kAlignment - 1) / kAlignment * kAlignment;
  auto* block = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, whole));
  if (block == nullptr) return result(cudaErrorMemoryAllocation);
  unsigned char* begin = block + kGuard;
  set_guard(block);
  set_guard(begin + bytes);
  std::memset(begin, 0xff, bytes);
  allocations()[begin] = {bytes, on_host};
  if (!on_host) used += bytes;
  *data = begin;
  return cudaSuccess;
}

cudaError_t release(void* data, bool on_host) {
  if (data == nullptr) return cudaSuccess;
  if (const cudaError_t error = refuse_while_capturing(); error != cudaSuccess) return result(error);
  finish_all();
  const std::lock_guard lock(mutex);
  const auto found = allocations().find(static_cast<unsigned char*>(data));
  if (found == allocations().end() || found->second.on_host != on_host) return result(cudaErrorInvalidValue);
  const auto [begin, allocation] = *found;
  check(begin, allocation);
  allocations().erase(found);
  if (!on_host) used -= allocation.bytes;
  unsigned char* block = begin - kGuard;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block, kGuard);
  __asan_unpoison_memory_region(begin + allocation.bytes, kGuard);
#endif
  std::memset(begin, 0xff, allocation.bytes);
  std::free(block);
  return cudaSuccess;
}

/// Whether the runtime knows the memory: else a copy goes through memory of its own.
bool known(const void* data) {
  const std::lock_guard lock(mutex);
  const auto* place = static_cast<const unsigned char*>(data);
  auto after = allocations().upper_bound(const_cast<unsigned char*>(place));
  return after != allocations().begin() && place < std::prev(after)->first + std::prev(after)->second.bytes;
}

}  // namespace

void set_memory(size_t bytes) {
  const std::lock_guard lock(mutex);
  total = bytes;
}

void check_guards() {
  const std::lock_guard lock(mutex);
  for (const auto& [data, allocation] : allocations()) check(data, allocation);
}

}  // namespace weft_emulation

using weft_emulation::result;
using weft_emulation::submit;

cudaError_t cudaMalloc(void** data, size_t bytes) { return weft_emulation::allocate(data, bytes, false); }
cudaError_t cudaFree(void* data) { return weft_emulation::release(data, false); }
cudaError_t cudaMallocHost(void** data, size_t bytes) { return weft_emulation::allocate(data, bytes, true); }
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned int) {
  return weft_emulation::allocate(data, bytes, true);
}
cudaError_t cudaFreeHost(void* data) { return weft_emulation::release(data, true); }

cudaError_t cudaHostGetDevicePointer(void** on_device, void* on_host, unsigned int flags) {
  const std::lock_guard lock(weft_emulation::mutex);
  auto* place = static_cast<unsigned char*>(on_host);
  auto after = weft_emulation::allocations().upper_bound(place);
  if (flags != 0 || after == weft_emulation::allocations().begin()) return result(cudaErrorInvalidValue);
  const auto& [begin, allocation] = *--after;
  if (!allocation.on_host || place >= begin + allocation.bytes) return result(cudaErrorInvalidValue);
  *on_device = on_host;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard lock(weft_emulation::mutex);
  *total = weft_emulation::total;
  *free = std::max(*total, weft_emulation::used) - weft_emulation::used;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  using weft_emulation::Kind;
  const auto move = [=](const void* from) {
    if (bytes > 0) std::memmove(dst, from, bytes);
  };
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (stream != nullptr) cudaStreamIsCapturing(stream, &capturing);
  if (capturing != cudaStreamCaptureStatusNone) return submit(stream, [=] { move(src); }, Kind::kCopy);
  if (!weft_emulation::known(src)) {
    const auto* begin = static_cast<const unsigned char*>(src);
    const auto taken = std::make_shared<std::vector<unsigned char>>(begin, begin + bytes);
    return submit(stream, [=] { move(taken->data()); }, Kind::kCopy);
  }
  const cudaError_t error = submit(stream, [=] { move(src); }, Kind::kCopy);
  if (error == cudaSuccess && !weft_emulation::known(dst)) weft_emulation::finish_stream(stream);
  return error;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  return submit(stream, [=] {
    if (bytes > 0) std::memset(data, value, bytes);
  });
}
cudaError_t cudaMemcpy(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind) {
  if (const cudaError_t error = weft_emulation::refuse_while_capturing(); error != cudaSuccess) return result(error);
  return cudaMemcpyAsync(dst, src, bytes, kind, nullptr);
}
cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  if (const cudaError_t error = weft_emulation::refuse_while_capturing(); error != cudaSuccess) return result(error);
  return cudaMemsetAsync(data, value, bytes, nullptr);
}
