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

std::vector<std::string> gather_texts(Store& store, const std::string& name, int rank, int size, const std::string& own,
                                      double timeout) {
  const auto key = [&](int of) { return concat(name, " of rank ", of); };
  store.set(key(rank), own);
  std::vector<std::string> texts;
  for (int of = 0; of < size; ++of) texts.push_back(store.get(key(of), timeout));
  return texts;
}

}  // namespace weft::dist
