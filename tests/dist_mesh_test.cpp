#include "dist/mesh.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "tests/error_of.h"

namespace weft::dist {
namespace {

/// Every mesh of every world size up to 16.
std::vector<Mesh> all_meshes() {
  std::vector<Mesh> meshes;
  for (int dp = 1; dp <= 16; ++dp) {
    for (int pp = 1; dp * pp <= 16; ++pp) {
      for (int cp = 1; dp * pp * cp <= 16; ++cp) {
        for (int tp = 1; dp * pp * cp * tp <= 16; ++tp) meshes.push_back(Mesh({dp, pp, cp, tp}));
      }
    }
  }
  return meshes;
}

/// Every set of axes.
std::vector<std::vector<Axis>> all_axis_sets() {
  std::vector<std::vector<Axis>> sets;
  for (unsigned bits = 0; bits < 1u << kAxes; ++bits) {
    std::vector<Axis> axes;
    for (const Axis axis : kAllAxes) {
      if (bits >> static_cast<unsigned>(axis) & 1) axes.push_back(axis);
    }
    sets.push_back(axes);
  }
  return sets;
}

TEST(Mesh, EveryMeshUpTo16RanksIsTried) {
  // Ordered factorisations of n into four factors: for n = 12, C(5,3) * 4 = 40; in all 1..16 they are
  // sum over n of product over primes of C(e + 3, 3).
  EXPECT_EQ(all_meshes().size(), 1u + 4 + 4 + 10 + 4 + 16 + 4 + 20 + 10 + 16 + 4 + 40 + 4 + 16 + 16 + 35);
}

TEST(Mesh, RanksAndCoordinatesAreInverse) {
  for (const Mesh& mesh : all_meshes()) {
    for (int rank = 0; rank < mesh.size(); ++rank) {
      const Mesh::Coordinates at = mesh.coordinates_of(rank);
      ASSERT_EQ(mesh.rank_of(at), rank) << mesh.to_string();
      for (const Axis axis : kAllAxes) {
        ASSERT_GE(at[static_cast<size_t>(axis)], 0);
        ASSERT_LT(at[static_cast<size_t>(axis)], mesh.size(axis));
      }
    }
  }
}

TEST(Mesh, TpIsInnermostAndDpOutermost) {
  const Mesh mesh({2, 3, 2, 4});
  EXPECT_EQ(mesh.rank_of({0, 0, 0, 1}), 1);
  EXPECT_EQ(mesh.rank_of({0, 0, 1, 0}), 4);
  EXPECT_EQ(mesh.rank_of({0, 1, 0, 0}), 8);
  EXPECT_EQ(mesh.rank_of({1, 0, 0, 0}), 24);
}

TEST(Mesh, GroupsPartitionTheRanksAndHaveTheRightSizes) {
  for (const Mesh& mesh : all_meshes()) {
    for (const auto& axes : all_axis_sets()) {
      int wanted = 1;
      for (const Axis axis : axes) wanted *= mesh.size(axis);
      std::vector<int> seen(static_cast<size_t>(mesh.size()), 0);
      const auto groups = mesh.groups(axes);
      ASSERT_EQ(groups.size() * static_cast<size_t>(wanted), static_cast<size_t>(mesh.size()));
      for (const auto& group : groups) {
        ASSERT_EQ(group.size(), static_cast<size_t>(wanted));
        ASSERT_TRUE(std::is_sorted(group.begin(), group.end()));
        for (size_t i = 0; i < group.size(); ++i) {
          ++seen[static_cast<size_t>(group[i])];
          ASSERT_EQ(mesh.members(group[i], axes), group) << mesh.to_string();
          ASSERT_EQ(mesh.index_in(group[i], axes), static_cast<int>(i)) << mesh.to_string();
          const auto first = mesh.coordinates_of(group[0]), here = mesh.coordinates_of(group[i]);
          for (const Axis axis : kAllAxes) {
            if (std::find(axes.begin(), axes.end(), axis) != axes.end()) continue;
            ASSERT_EQ(first[static_cast<size_t>(axis)], here[static_cast<size_t>(axis)]);
          }
        }
      }
      for (const int times : seen) ASSERT_EQ(times, 1) << mesh.to_string();
    }
  }
}

TEST(Mesh, TwoRanksShareOneGroupAlongAnAxisAtMost) {
  for (const Mesh& mesh : all_meshes()) {
    for (int a = 0; a < mesh.size(); ++a) {
      for (int b = 0; b < a; ++b) {
        int shared = 0;
        for (const Axis axis : kAllAxes) {
          const auto members = mesh.members(a, axis);
          shared += static_cast<int>(std::count(members.begin(), members.end(), b));
        }
        ASSERT_LE(shared, 1) << mesh.to_string();
      }
    }
  }
}

TEST(Mesh, TextIsReadBack) {
  for (const Mesh& mesh : all_meshes()) EXPECT_EQ(Mesh::parse(mesh.to_string(), mesh.size()), mesh);
  EXPECT_EQ(Mesh::parse("tp=2,dp=3"), Mesh({3, 1, 1, 2}));
  EXPECT_EQ(Mesh::parse(""), Mesh());
}

TEST(Mesh, WrongTextIsAnErrorThatNamesIt) {
  EXPECT_ERROR(ErrorKind::kUsage, "no axis is called \"tq\"", Mesh::parse("dp=2,tq=2"));
  EXPECT_ERROR(ErrorKind::kUsage, "did you mean \"tp\"?", Mesh::parse("dp=2,tq=2"));
  EXPECT_ERROR(ErrorKind::kUsage, "no axis is called \"data\"", Mesh::parse("data=2"));
  EXPECT_ERROR(ErrorKind::kUsage, "size of dp must be a whole number from 1", Mesh::parse("dp=0"));
  for (const char* size : {"-2", "1.5", "", "2x", " 2", "99999999999", "+2", "0x2"}) {
    EXPECT_ERROR(ErrorKind::kUsage, "must be a whole number from 1", Mesh::parse(std::string("dp=") + size));
  }
  EXPECT_ERROR(ErrorKind::kUsage, "dp is given twice", Mesh::parse("dp=2,dp=2"));
  EXPECT_ERROR(ErrorKind::kUsage, "\"2\" is not AXIS=SIZE", Mesh::parse("2"));
  EXPECT_ERROR(ErrorKind::kUsage, "nothing follows the last comma", Mesh::parse("dp=2,"));
  EXPECT_ERROR(ErrorKind::kUsage, "is not AXIS=SIZE", Mesh::parse("dp=2,,tp=2"));
  EXPECT_ERROR(ErrorKind::kUsage, "dp 2 x pp 1 x cp 1 x tp 3 = 6 ranks, but there are 8", Mesh::parse("dp=2,tp=3", 8));
  EXPECT_ERROR(ErrorKind::kValue, "is beyond", Mesh::parse("dp=65536,tp=65536"));
  EXPECT_ERROR(ErrorKind::kValue, "pp must be at least 1, got 0", Mesh({1, 0, 1, 1}));
  EXPECT_ERROR(ErrorKind::kIndex, "rank 8 is outside a mesh of 8", Mesh({8, 1, 1, 1}).coordinates_of(8));
  EXPECT_ERROR(ErrorKind::kIndex, "coordinate 2 is outside axis tp", Mesh({2, 1, 1, 2}).rank_of({0, 0, 0, 2}));
}

TEST(Mesh, ThePictureShowsEveryRankOnce) {
  EXPECT_EQ(Mesh({2, 2, 1, 2}).picture(),
            "8 ranks: dp 2 x pp 2 x cp 1 x tp 2, tp innermost\n"
            "dp 0  pp 0  [0 1]\n"
            "dp 0  pp 1  [2 3]\n"
            "dp 1  pp 0  [4 5]\n"
            "dp 1  pp 1  [6 7]\n");
  EXPECT_EQ(Mesh({1, 1, 2, 6}).picture(),
            "12 ranks: dp 1 x pp 1 x cp 2 x tp 6, tp innermost\n"
            "dp 0  pp 0  [ 0  1  2  3  4  5] [ 6  7  8  9 10 11]\n");
}

}  // namespace
}  // namespace weft::dist
