#pragma once
#include "models/verify/verify.h"

namespace weft::models {

/// What ranks hold of a kind of tensor. @throws Error kValue for losses and norms.
std::vector<HeldPart> RankStep::* parts_of(Compared what);

/// Equal in every bit, but that all NaN are one.
bool same_bits(double a, double b);

/// Compares a step of a layout's ranks with that of one rank, bit for bit, and counts what it compares.
class BitComparison {
 public:
  BitComparison(VerifyReport& report, size_t layout, int64_t step) : report_(report), layout_(layout), step_(step) {}

  // Each answers with whether all was equal; the first difference is in the report otherwise.
  bool losses(const RankStep& one, const std::vector<RankStep>& ranks);
  /// Those that a rank has none of are of layers that others have.
  bool norms(const RankStep& one, const std::vector<RankStep>& ranks);
  /// Every rank's parts of gradients, parameters or state, and that each element is somewhere.
  bool tensors(Compared what, const RankStep& one, const std::vector<RankStep>& ranks);
  /// Only the latter.
  bool complete(Compared what, const RankStep& one, const std::vector<RankStep>& ranks);

  /// Adds to what was compared.
  void count(Compared what, int64_t tensors, int64_t elements, int64_t different = 0);
  Difference difference(Compared what, const std::string& tensor) const;
  /// Puts `first` into the report. @return whether there is none
  bool finish(std::optional<Difference> first, int64_t compared, int64_t different);

 private:
  VerifyReport::Tally& tally(Compared what) { return report_.tallies[static_cast<size_t>(what)]; }
  std::optional<Difference> tensor(Compared what, const HeldPart& whole, const std::vector<RankStep>& ranks,
                                   bool values);
  template <class Compare>
  bool each(Compared what, const RankStep& one, const Compare& compare);

  VerifyReport& report_;
  size_t layout_;
  int64_t step_;
};

}  // namespace weft::models
