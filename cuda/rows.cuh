#pragma once
// Rows that are read once and stay in registers: how they are dealt to the threads of a block.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/store_whole.cuh"

namespace weft::cuda {

/// A row belongs to `warps` warps, of which every thread holds up to `packs` packs; a block has `rows` rows.
/// threadIdx.x counts within a row, threadIdx.y the rows.
struct RowLayout {
  int warps = 0;
  int packs = 0;
  int rows = 0;
  explicit operator bool() const { return warps > 0; }
  dim3 threads() const { return dim3(static_cast<unsigned>(warps * kWarp), static_cast<unsigned>(rows)); }
};

/// For rows that know nothing of each other, so that block_reduce() is over one row: four of one warp each to a block,
/// or one row of several warps. Leaves the fewest threads without work, with the fewest warps among equals; false if
/// `most_warps` cannot hold a row of `packs` packs with `most_packs` to a thread.
inline RowLayout row_layout(int64_t packs, int most_packs, int most_warps) {
  RowLayout best;
  for (int warps = 1; warps <= most_warps; ++warps) {
    const int64_t each = divide_up(packs, kWarp * warps);
    if (each > most_packs) continue;
    if (!best || warps * each < best.warps * best.packs) best = {warps, static_cast<int>(each), warps == 1 ? 4 : 1};
  }
  return best;
}

/// f.operator()<packs>() for a number from 1 to kMost.
template <int kMost, class F>
void with_packs(int packs, F&& f) {
  if constexpr (kMost > 1) {
    if (packs < kMost) return with_packs<kMost - 1>(packs, f);
  }
  f.template operator()<kMost>();
}

/// 16 bytes of a row, kept as they were loaded: 4 registers, where the numbers made of them may need 8.
template <class T>
struct Held {
  uint32_t words[4];

  __device__ void load(const T* from) { *this = std::bit_cast<Held>(load_pack<kFull<T>>(from)); }
  __device__ void store(T* to) const { store_pack(to, std::bit_cast<Pack<T, kFull<T>>>(*this)); }

  /// Numbers made of it before are made again when they are next asked for, where the compiler would keep them all.
  __device__ void forget() {
#if !defined(WEFT_CUDA_EMULATION)
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
#endif
  }

  __device__ float operator[](int e) const {
    if constexpr (std::is_same_v<T, float>) {
      return std::bit_cast<float>(words[e]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return std::bit_cast<float>(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000u);
    } else {
      return widen(std::bit_cast<T>(static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16))));
    }
  }
};

/// Blocks for `rows` rows, `each` to a block; kernels loop over what is left beyond the limit.
inline unsigned row_blocks(int64_t rows, int64_t each) {
  return static_cast<unsigned>(std::min<int64_t>(divide_up(rows, each), int64_t{1} << 20));
}

}  // namespace weft::cuda
