#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace weft::dist {

/// The ways in which work is cut up, from the outermost to the innermost.
enum class Axis : uint8_t {
  dp,  ///< data parallel: other samples
  pp,  ///< pipeline parallel: other layers
  cp,  ///< context parallel: other tokens of a sequence
  tp,  ///< tensor parallel: other parts of a matrix
};
inline constexpr int kAxes = 4;
inline constexpr std::array<Axis, kAxes> kAllAxes = {Axis::dp, Axis::pp, Axis::cp, Axis::tp};

/// "dp", "pp", "cp", "tp".
const char* name(Axis axis);

/// World ranks laid out on named axes. A pure value: it knows sizes and arithmetic, no process.
///
///   rank = ((dp * PP + pp) * CP + cp) * TP + tp        (lower case: coordinates; upper case: sizes)
///
/// tp is innermost because its ranks talk the most: two all-reduces of every layer's activations, in the forward and in
/// the backward pass, which nothing hides. Neighbouring ranks usually share a machine and its fastest links. cp
/// exchanges keys and values once a layer, behind attention; pp passes one activation from stage to stage; dp exchanges
/// gradients once a step, hidden behind the backward pass, and so may span the slowest links.
class Mesh {
 public:
  using Coordinates = std::array<int, kAxes>;  ///< indexed by Axis

  /// One rank.
  Mesh() = default;
  /// @throws Error kValue for a size below 1 or a product beyond 2^31 - 1.
  explicit Mesh(const Coordinates& sizes);

  /// "dp=2,tp=2,pp=2": axes in any order, those left out have size 1; "" is one rank. With world_size > 0 the product
  /// must be that.
  /// @throws Error kUsage for an unknown axis, one named twice, a size that is no whole number from 1, another product.
  static Mesh parse(std::string_view text, int world_size = 0);

  int size() const;
  int size(Axis axis) const { return sizes_[static_cast<size_t>(axis)]; }
  /// @throws Error kIndex for a coordinate outside its axis.
  int rank_of(const Coordinates& at) const;
  /// @throws Error kIndex for a rank outside the mesh.
  Coordinates coordinates_of(int rank) const;

  /// Ranks that differ from `rank` along `axes` only, itself included, in increasing order: the members of its group.
  std::vector<int> members(int rank, std::span<const Axis> axes) const;
  std::vector<int> members(int rank, Axis axis) const { return members(rank, std::span(&axis, 1)); }
  /// Where `rank` stands in members(rank, axes).
  int index_in(int rank, std::span<const Axis> axes) const;
  /// All groups along `axes`, ordered by their first member: a partition of the ranks.
  std::vector<std::vector<int>> groups(std::span<const Axis> axes) const;
  std::vector<std::vector<int>> groups(Axis axis) const { return groups(std::span(&axis, 1)); }

  /// "dp=2,pp=2,tp=2", axes of size 1 left out; "" for one rank. parse() reads it back.
  std::string to_string() const;
  /// A picture in text: a block per dp coordinate, a row per pp stage, cp blocks with tp ranks in brackets.
  std::string picture() const;

  bool operator==(const Mesh&) const = default;

 private:
  Coordinates sizes_ = {1, 1, 1, 1};
};

}  // namespace weft::dist
