#include "dist/mesh.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "core/error.h"

namespace weft::dist {
namespace {

constexpr std::array<const char*, kAxes> kNames = {"dp", "pp", "cp", "tp"};

bool holds(std::span<const Axis> axes, int axis) {
  return std::find(axes.begin(), axes.end(), static_cast<Axis>(axis)) != axes.end();
}

}  // namespace

const char* name(Axis axis) { return kNames.at(static_cast<size_t>(axis)); }

Mesh::Mesh(const Coordinates& sizes) : sizes_(sizes) {
  int64_t product = 1;
  for (size_t i = 0; i < kAxes; ++i) {
    if (sizes[i] < 1) fail(ErrorKind::kValue, "mesh", kNames[i], " must be at least 1, got ", sizes[i]);
    product *= sizes[i];
    if (product > std::numeric_limits<int>::max()) {
      fail(ErrorKind::kValue, "mesh", "the product of the sizes, ", to_string(), ", is beyond ",
           std::numeric_limits<int>::max());
    }
  }
}

Mesh Mesh::parse(std::string_view text, int world_size) {
  Coordinates sizes = {1, 1, 1, 1};
  std::array<bool, kAxes> seen = {};
  for (std::string_view rest = text; !rest.empty();) {
    const size_t comma = rest.find(',');
    const std::string_view part = rest.substr(0, comma);
    rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
    if (comma != std::string_view::npos && rest.empty()) {
      fail(ErrorKind::kUsage, "mesh", "in ", quoted(text), ": nothing follows the last comma");
    }
    const size_t equals = part.find('=');
    if (equals == std::string_view::npos) {
      fail(ErrorKind::kUsage, "mesh", "in ", quoted(text), ": ", quoted(part),
           " is not AXIS=SIZE. Hint: write dp=2,tp=2");
    }
    const std::string_view axis = part.substr(0, equals), size = part.substr(equals + 1);
    const auto at = std::find(kNames.begin(), kNames.end(), axis);
    if (at == kNames.end()) {
      fail(ErrorKind::kUsage, "mesh", "in ", quoted(text), ": no axis is called ", quoted(axis),
           "; axes are dp, pp, cp and tp", did_you_mean(axis, kNames));
    }
    const auto i = static_cast<size_t>(at - kNames.begin());
    if (seen[i]) fail(ErrorKind::kUsage, "mesh", "in ", quoted(text), ": ", *at, " is given twice");
    seen[i] = true;
    int value = 0;
    const auto [end, error] = std::from_chars(size.data(), size.data() + size.size(), value);
    if (error != std::errc() || end != size.data() + size.size() || value < 1) {
      fail(ErrorKind::kUsage, "mesh", "in ", quoted(text), ": the size of ", *at, " must be a whole number from 1 to ",
           std::numeric_limits<int>::max(), ", got ", quoted(size));
    }
    sizes[i] = value;
  }
  const Mesh mesh(sizes);
  if (world_size > 0 && mesh.size() != world_size) {
    std::string product;
    for (size_t i = 0; i < kAxes; ++i) product += concat(i ? " x " : "", kNames[i], ' ', sizes[i]);
    fail(ErrorKind::kUsage, "mesh", quoted(text), " has ", product, " = ", mesh.size(), " ranks, but there are ",
         world_size, ". Hint: the product of the sizes must be the number of ranks");
  }
  return mesh;
}

int Mesh::size() const { return sizes_[0] * sizes_[1] * sizes_[2] * sizes_[3]; }

int Mesh::rank_of(const Coordinates& at) const {
  int rank = 0;
  for (size_t i = 0; i < kAxes; ++i) {
    if (at[i] < 0 || at[i] >= sizes_[i]) {
      fail(ErrorKind::kIndex, "mesh", "coordinate ", at[i], " is outside axis ", kNames[i], " of size ", sizes_[i]);
    }
    rank = rank * sizes_[i] + at[i];
  }
  return rank;
}

Mesh::Coordinates Mesh::coordinates_of(int rank) const {
  if (rank < 0 || rank >= size()) {
    fail(ErrorKind::kIndex, "mesh", "rank ", rank, " is outside a mesh of ", size(), " ranks");
  }
  Coordinates at;
  for (size_t i = kAxes; i-- > 0;) {
    at[i] = rank % sizes_[i];
    rank /= sizes_[i];
  }
  return at;
}

std::vector<int> Mesh::members(int rank, std::span<const Axis> axes) const {
  const Coordinates here = coordinates_of(rank);
  Coordinates first = here, last = here;
  for (size_t i = 0; i < kAxes; ++i) {
    if (holds(axes, static_cast<int>(i))) first[i] = 0, last[i] = sizes_[i] - 1;
  }
  std::vector<int> found;
  Coordinates at;
  for (at[0] = first[0]; at[0] <= last[0]; ++at[0]) {
    for (at[1] = first[1]; at[1] <= last[1]; ++at[1]) {
      for (at[2] = first[2]; at[2] <= last[2]; ++at[2]) {
        for (at[3] = first[3]; at[3] <= last[3]; ++at[3]) found.push_back(rank_of(at));
      }
    }
  }
  return found;
}

int Mesh::index_in(int rank, std::span<const Axis> axes) const {
  const Coordinates at = coordinates_of(rank);
  int index = 0;
  for (size_t i = 0; i < kAxes; ++i) {
    if (holds(axes, static_cast<int>(i))) index = index * sizes_[i] + at[i];
  }
  return index;
}

std::vector<std::vector<int>> Mesh::groups(std::span<const Axis> axes) const {
  std::vector<std::vector<int>> found;
  for (int rank = 0; rank < size(); ++rank) {
    if (index_in(rank, axes) == 0) found.push_back(members(rank, axes));
  }
  return found;
}

std::string Mesh::to_string() const {
  std::string text;
  for (size_t i = 0; i < kAxes; ++i) {
    if (sizes_[i] != 1) text += concat(text.empty() ? "" : ",", kNames[i], '=', sizes_[i]);
  }
  return text;
}

std::string Mesh::picture() const {
  const size_t width = std::to_string(size() - 1).size();
  std::string out = concat(size(), size() == 1 ? " rank" : " ranks", ": dp ", sizes_[0], " x pp ", sizes_[1], " x cp ",
                           sizes_[2], " x tp ", sizes_[3], ", tp innermost\n");
  for (int dp = 0; dp < sizes_[0]; ++dp) {
    for (int pp = 0; pp < sizes_[1]; ++pp) {
      out += concat("dp ", dp, "  pp ", pp, " ");
      for (int cp = 0; cp < sizes_[2]; ++cp) {
        out += " [";
        for (int tp = 0; tp < sizes_[3]; ++tp) {
          const std::string rank = std::to_string(rank_of({dp, pp, cp, tp}));
          out += (tp ? " " : "") + std::string(width - rank.size(), ' ') + rank;
        }
        out += ']';
      }
      out += '\n';
    }
  }
  return out;
}

}  // namespace weft::dist
