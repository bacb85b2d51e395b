#include "dist/sharded_norms.h"

#include <algorithm>

#include "core/memory.h"

namespace weft::dist {

void ShardedNorms::reduce(std::span<double> squares, const Parameters&) {
  const MemoryScope scope(MemoryCategory::communication);
  const Tensor all = Tensor::from(std::span<const double>(squares), {static_cast<int64_t>(squares.size())});
  group_.all_reduce_(all);
  const std::vector<double> sums = all.to_vector<double>();
  std::copy(sums.begin(), sums.end(), squares.begin());
}

/// Their words are whole numbers, which add up to the same in any order.
void ShardedNorms::reduce(std::span<optim::ExactSum> squares, const Parameters&) {
  const MemoryScope scope(MemoryCategory::communication);
  std::vector<int64_t> words;
  for (const optim::ExactSum& sum : squares) words.insert(words.end(), sum.words.begin(), sum.words.end());
  const Tensor all = Tensor::from(words, {static_cast<int64_t>(words.size())});
  group_.all_reduce_(all);
  words = all.to_vector<int64_t>();
  for (size_t i = 0; i < squares.size(); ++i) {
    std::copy_n(words.begin() + static_cast<int64_t>(i * squares[i].words.size()), squares[i].words.size(),
                squares[i].words.begin());
  }
}

}  // namespace weft::dist
