#include "dist/mesh_norms.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <sstream>
#include <utility>

#include "core/memory.h"
#include "dist/texts.h"

namespace weft::dist {
namespace {

constexpr const char* kWhere = "norms over a mesh";

std::span<double> numbers(double& square) { return {&square, 1}; }
std::span<int64_t> numbers(optim::ExactSum& square) { return square.words; }

/// Adds up over a group the squares of all parameters, or of those that are cut.
template <class Square>
void add_up(Group* group, std::span<Square> squares, const Parameters& parameters, bool all) {
  if (group == nullptr || group->size() == 1) return;
  const MemoryScope scope(MemoryCategory::communication);
  std::vector<std::decay_t<decltype(numbers(squares[0])[0])>> sums;
  const auto each = [&](auto visit) {
    for (size_t i = 0; i < squares.size(); ++i) {
      if (all || parameters[i].part) visit(numbers(squares[i]));
    }
  };
  each([&](auto part) { sums.insert(sums.end(), part.begin(), part.end()); });
  if (sums.empty()) return;
  const Tensor tensor = Tensor::from(sums, {static_cast<int64_t>(sums.size())}, group->device());
  group->all_reduce_(tensor);
  sums = tensor.to_vector<typename decltype(sums)::value_type>();
  auto next = sums.begin();
  each([&](auto part) {
    std::copy_n(next, part.size(), part.begin());
    next += static_cast<int64_t>(part.size());
  });
}

}  // namespace

MeshNorms::MeshNorms(const Groups& groups, const std::vector<std::string>& names, const std::vector<int64_t>& places)
    : groups_(groups) {
  if (names.size() != places.size())
    fail(ErrorKind::kValue, kWhere, "there are ", names.size(), " names, but ", places.size(), " places");
  if (groups.stages == nullptr || groups.stages->size() == 1) return;
  const MemoryScope scope(MemoryCategory::communication);
  std::ostringstream own;
  for (size_t i = 0; i < names.size(); ++i) own << places[i] << ' ' << names[i] << '\n';
  std::vector<std::pair<int64_t, std::string>> all;
  for (const std::string& text : gather_texts(*groups.stages, own.str())) {
    const size_t before = all.size();
    std::istringstream lines(text);
    int64_t place = 0;
    for (std::string name; lines >> place >> std::ws && std::getline(lines, name);) all.emplace_back(place, name);
    counts_.push_back(static_cast<int64_t>(all.size() - before));
  }
  std::vector<size_t> order(all.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return all[a].first < all[b].first; });
  std::set<std::string> seen;  // a tied tensor is on two ranks, and counts once
  for (const size_t i : order) {
    if (seen.insert(all[i].second).second) model_.push_back(i);
  }
}

void MeshNorms::reduce(std::span<double> squares, const Parameters& parameters) {
  add_up(groups_.shards, squares, parameters, true);
  add_up(groups_.tensor, squares, parameters, false);
}

void MeshNorms::reduce(std::span<optim::ExactSum> squares, const Parameters& parameters) {
  // Their words are whole numbers, which add up to the same in any order.
  add_up(groups_.shards, squares, parameters, true);
  add_up(groups_.tensor, squares, parameters, false);
}

void MeshNorms::complete(std::vector<double>& squares, const Parameters&) {
  if (model_.empty()) return;
  const MemoryScope scope(MemoryCategory::communication);
  const Tensor own = Tensor::from(squares, {static_cast<int64_t>(squares.size())}, groups_.stages->device());
  const std::vector<double> all = groups_.stages->all_gather(own, counts_).to_vector<double>();
  squares.clear();
  for (const size_t i : model_) squares.push_back(all[i]);
}

}  // namespace weft::dist
