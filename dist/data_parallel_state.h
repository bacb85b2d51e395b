#pragma once
#include <optional>
#include <string>
#include <vector>

#include "dist/data_parallel.h"
#include "dist/gradient_sums.h"
#include "dist/parameter_units.h"

namespace weft::dist {

/// What a DataParallel consists of: which rank has what, settled when it is made, and the parts that move data.
struct DataParallel::State {
  State(Group& group, Parameters parameters, const DataParallelOptions& options);

  /// A second use (SecondUse), checked.
  struct Use {
    size_t parameter;
    Group* pair = nullptr;
    size_t bucket = 0;  ///< of the second leaf's gradients, if there is no pair
  };

  Group& group;
  Group* replicas;
  Zero zero;
  Parameters model, own;
  std::vector<ShardPiece> pieces;
  std::vector<Use> uses;
  std::vector<Tensor> leaves;         ///< of the parameters, then of second uses
  std::vector<size_t> bucket_of;      ///< [parameter]
  size_t buckets = 0;                 ///< of parameters; those of second leaves follow
  std::vector<size_t> forward_order;  ///< those, by the first of their parameters
  std::optional<GradientSums> sums;
  std::optional<ParameterUnits> units;  ///< with Zero::kParameters
  size_t started_before = 0;            ///< transfers that had begun before the present unit

  const ShardBucket& layout(size_t bucket) const { return sums->layout(bucket); }
  /// The second use of a parameter, or null.
  const Use* use_of(size_t parameter) const;
  /// This rank's range of a bucket's gradients of the whole step.
  Tensor finish(size_t bucket);
  /// Begins to gather a bucket's parameters from the ranks that have updated them. Whoever reaches for one waits for
  /// it.
  void gather(size_t bucket) const;
  /// @throws Error kState, naming a unit that is whole.
  void require_units_ended(const char* before) const;

 private:
  std::optional<size_t> find(const std::string& parameter) const;
  void check_parameters() const;
  std::vector<GradientSums::Leaf> add_uses(const std::vector<SecondUse>& given);
  std::vector<std::vector<size_t>> check_units(const std::vector<std::vector<std::string>>& names) const;
  std::vector<std::vector<size_t>> transfers(const std::vector<std::vector<size_t>>& units, int64_t bytes) const;
  void share_values() const;
  void make_own();
};

}  // namespace weft::dist
