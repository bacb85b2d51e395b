#pragma once
#include <string>
#include <vector>

#include "dist/group.h"
#include "optim/norm.h"

namespace weft::dist {

/// Norms of a model that is spread over a mesh, the same on every rank: squares of parts are added up over the ranks
/// that have them, those of copies count once, and the norm over the whole model has every layer's.
///
/// Squares on the CPU travel as exact sums: where parts are cut at multiples of optim::kSquareBlock (DataParallel does
/// so), or not at all, a norm has the bits that one process gets. Slices of tensor parallelism are cut elsewhere.
class MeshNorms final : public optim::NormReducer {
 public:
  struct Groups {
    Group* shards = nullptr;  ///< ranks among which every parameter is cut (ZeRO); null: none
    Group* tensor = nullptr;  ///< ranks among which those parameters are cut that say so (Parameter::part)
    Group* stages = nullptr;  ///< ranks that have other layers
  };
  /// Groups must outlive this. All their ranks make one at the same time.
  /// @param names   with `stages`: of this rank's parameters, in their order
  /// @param places  of each in the model: the model's order is that of places, then of names on a rank
  /// @throws Error kValue unless there is a place for each name.
  explicit MeshNorms(const Groups& groups, const std::vector<std::string>& names = {},
                     const std::vector<int64_t>& places = {});

  void reduce(std::span<double> squares, const Parameters& parameters) override;
  void reduce(std::span<optim::ExactSum> squares, const Parameters& parameters) override;
  bool exact() const override { return true; }
  void complete(std::vector<double>& squares, const Parameters& parameters) override;

 private:
  Groups groups_;
  Counts counts_;              ///< parameters of each rank of `stages`
  std::vector<size_t> model_;  ///< [parameter of the model]: where it stands in the stages' lists end to end
};

}  // namespace weft::dist
