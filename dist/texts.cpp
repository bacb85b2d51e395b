#include "dist/texts.h"

#include "core/memory.h"

namespace weft::dist {

std::vector<std::string> gather_texts(Group& group, const std::string& own) {
  const MemoryScope scope(MemoryCategory::communication);
  const std::vector<int64_t> size = {static_cast<int64_t>(own.size())};
  const std::vector<int64_t> sizes = group.all_gather(Tensor::from(size, {1}, group.device())).to_vector<int64_t>();
  const Tensor bytes = Tensor::from(std::vector<uint8_t>(own.begin(), own.end()), {size[0]}, group.device());
  const std::vector<uint8_t> all = group.all_gather(bytes, sizes).to_vector<uint8_t>();
  std::vector<std::string> texts;
  auto at = all.begin();
  for (const int64_t count : sizes) texts.emplace_back(at, at + count), at += count;
  return texts;
}

}  // namespace weft::dist
