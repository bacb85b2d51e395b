#include "core/shape.h"

#include <gtest/gtest.h>

#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "tests/error_of.h"

namespace weft {
namespace {

std::string text(const Dims& dims) {
  std::ostringstream out;
  out << dims;
  return out.str();
}

TEST(Dims, HoldUpToSixValues) {
  EXPECT_EQ(Dims().rank(), 0);
  EXPECT_TRUE(Dims().empty());
  const Dims six{1, 2, 3, 4, 5, 6};
  EXPECT_EQ(six.rank(), 6);
  EXPECT_EQ(six.back(), 6);
  EXPECT_ERROR(ErrorKind::kShape, "7 dimensions; at most 6 are supported", (Dims{1, 2, 3, 4, 5, 6, 7}));
  EXPECT_ERROR(ErrorKind::kShape, "more than 6 dimensions", Dims(six).push_back(7));
  EXPECT_ERROR(ErrorKind::kShape, "more than 6 dimensions", Dims(six).insert(0, 7));
  EXPECT_ERROR(ErrorKind::kShape, "more than 6 dimensions", Dims::filled(7, 1));
}

TEST(Dims, InsertAndEraseAtEveryPlace) {
  for (int i = 0; i <= 3; ++i) {
    Dims dims{10, 20, 30};
    std::vector<int64_t> want{10, 20, 30};
    dims.insert(i, 99);
    want.insert(want.begin() + i, 99);
    EXPECT_EQ(std::vector<int64_t>(dims.begin(), dims.end()), want);
    dims.erase(i);
    EXPECT_EQ(dims, (Dims{10, 20, 30}));
  }
}

TEST(Dims, AreEqualIfRankAndValuesAre) {
  EXPECT_EQ((Dims{1, 2}), (Dims{1, 2}));
  EXPECT_FALSE((Dims{1, 2}) == (Dims{1, 2, 0}));
  EXPECT_FALSE((Dims{1, 2}) == (Dims{1, 3}));
  EXPECT_EQ(Dims(), Dims());
  Dims shorter{1, 2, 3};
  shorter.erase(2);
  EXPECT_EQ(shorter, (Dims{1, 2})) << "what was erased must not count";
}

TEST(Dims, PrintInBrackets) {
  EXPECT_EQ(text({}), "[]");
  EXPECT_EQ(text({8}), "[8]");
  EXPECT_EQ(text({8, -1, 768}), "[8, -1, 768]");
}

TEST(Numel, MultipliesSizes) {
  EXPECT_EQ(numel({}), 1);
  EXPECT_EQ(numel({7}), 7);
  EXPECT_EQ(numel({2, 3, 4}), 24);
  EXPECT_EQ(numel({2, 0, 4}), 0);
  EXPECT_EQ(numel({int64_t{1} << 31, int64_t{1} << 31}), int64_t{1} << 62);
}

TEST(Numel, RefusesNegativeSizesAndOverflow) {
  EXPECT_ERROR(ErrorKind::kShape, "[empty] a size must not be negative, got [2, -3]", numel({2, -3}, "empty"));
  EXPECT_ERROR(ErrorKind::kShape, "must not be negative", numel({0, -1}));
  const int64_t big = int64_t{1} << 32;
  EXPECT_ERROR(ErrorKind::kShape, "does not fit in 64 bits", numel({big, big}));
  EXPECT_ERROR(ErrorKind::kShape, "does not fit in 64 bits", numel({big, big, big, big, 0}));
  EXPECT_ERROR(ErrorKind::kShape, "does not fit in 64 bits", numel({0, big, big}));
}

TEST(Strides, AreRowMajor) {
  EXPECT_EQ(contiguous_strides({}), Dims());
  EXPECT_EQ(contiguous_strides({5}), (Dims{1}));
  EXPECT_EQ(contiguous_strides({2, 3, 4}), (Dims{12, 4, 1}));
  EXPECT_EQ(contiguous_strides({2, 0, 4}), (Dims{4, 4, 1})) << "no stride is 0: that means repeated";
}

TEST(Contiguous, MeansRowMajorWithoutHoles) {
  EXPECT_TRUE(is_contiguous({}, {}));
  EXPECT_TRUE(is_contiguous({2, 3}, {3, 1}));
  EXPECT_FALSE(is_contiguous({2, 3}, {1, 2}));
  EXPECT_FALSE(is_contiguous({2, 3}, {4, 1}));
  EXPECT_FALSE(is_contiguous({2, 3}, {0, 1}));
  EXPECT_FALSE(is_contiguous({3}, {2}));
  EXPECT_TRUE(is_contiguous({1, 3, 1}, {77, 1, 5})) << "a dimension of size 1 may have any stride";
  EXPECT_TRUE(is_contiguous({3, 0}, {17, 5})) << "nothing is in any order";
  EXPECT_TRUE(is_contiguous({0, 3, 2}, {6, 1, 3})) << "nothing is in any order";
}

TEST(NormalizeDim, CountsNegativeOnesFromTheEnd) {
  for (int rank = 1; rank <= 6; ++rank) {
    for (int dim = 0; dim < rank; ++dim) {
      EXPECT_EQ(normalize_dim(dim, rank, "x"), dim);
      EXPECT_EQ(normalize_dim(dim - rank, rank, "x"), dim);
    }
    EXPECT_ERROR(ErrorKind::kIndex,
                 concat("[sum] dimension ", rank, " of a tensor with ", rank, " dimensions; expected one from -", rank),
                 normalize_dim(rank, rank, "sum"));
    EXPECT_ERROR(ErrorKind::kIndex, "[sum] dimension", normalize_dim(-rank - 1, rank, "sum"));
  }
  EXPECT_ERROR(ErrorKind::kIndex, "[sum] dimension 0 of a tensor with 0 dimensions", normalize_dim(0, 0, "sum"));
  EXPECT_ERROR(ErrorKind::kIndex, "[sum] dimension", normalize_dim(std::numeric_limits<int64_t>::min(), 3, "sum"));
  EXPECT_ERROR(ErrorKind::kIndex, "[sum] dimension", normalize_dim(std::numeric_limits<int64_t>::max(), 3, "sum"));
}

/// Every shape of up to three dimensions with sizes 0 to 3.
std::vector<Shape> small_shapes() {
  std::vector<Shape> shapes = {Shape()};
  for (size_t from = 0, rank = 1; rank <= 3; ++rank) {
    const size_t end = shapes.size();
    for (; from < end; ++from) {
      for (int64_t size = 0; size < 4; ++size) {
        Shape shape = shapes[from];
        shape.push_back(size);
        shapes.push_back(shape);
      }
    }
  }
  return shapes;
}

/// Size of dimension -i, 1 if the shape has none.
int64_t from_end(const Shape& shape, int i) { return i <= shape.rank() ? shape[shape.rank() - i] : 1; }

TEST(Broadcast, AgreesWithTheRuleForEveryPairOfSmallShapes) {
  int fits = 0, refusals = 0;
  for (const Shape& a : small_shapes()) {
    for (const Shape& b : small_shapes()) {
      bool fit = true, into = a.rank() <= b.rank();
      for (int i = 1; i <= 3; ++i) {
        const int64_t x = from_end(a, i), y = from_end(b, i);
        fit &= x == y || x == 1 || y == 1;
        into &= x == y || x == 1;
      }
      EXPECT_EQ(broadcastable_to(a, b), into) << a << ' ' << b;
      if (!fit) {
        EXPECT_THROW(broadcast_shapes(a, b, "add"), Error) << a << ' ' << b;
        ++refusals;
        continue;
      }
      const Shape out = broadcast_shapes(a, b, "add");
      ++fits;
      EXPECT_EQ(out, broadcast_shapes(b, a, "add"));
      ASSERT_EQ(out.rank(), std::max(a.rank(), b.rank()));
      for (int i = 1; i <= out.rank(); ++i) {
        EXPECT_EQ(from_end(out, i), from_end(a, i) == 1 ? from_end(b, i) : from_end(a, i)) << a << ' ' << b;
      }
      EXPECT_TRUE(broadcastable_to(a, out) && broadcastable_to(b, out)) << a << ' ' << b;
    }
  }
  EXPECT_GT(fits, 1000);
  EXPECT_GT(refusals, 1000);
}

TEST(Broadcast, ErrorNamesShapesAndDimension) {
  EXPECT_ERROR(ErrorKind::kShape,
               "[add] shapes [2, 3] and [4, 3] do not broadcast: at dimension -2 sizes 2 and 4 differ",
               broadcast_shapes({2, 3}, {4, 3}, "add"));
  EXPECT_ERROR(ErrorKind::kShape, "[add] shape [2, 3] does not broadcast to [3]",
               broadcast_strides({2, 3}, {3, 1}, {3}, "add"));
}

TEST(Broadcast, StridesAreZeroWhereADimensionIsRepeated) {
  EXPECT_EQ(broadcast_strides({3, 1}, {1, 1}, {2, 3, 4}, "add"), (Dims{0, 1, 0}));
  EXPECT_EQ(broadcast_strides({}, {}, {2, 2}, "add"), (Dims{0, 0}));
  EXPECT_EQ(broadcast_strides({2, 3}, {3, 1}, {2, 3}, "add"), (Dims{3, 1}));
  EXPECT_EQ(broadcast_strides({1, 3}, {7, 1}, {1, 3}, "add"), (Dims{7, 1})) << "size 1 to size 1 repeats nothing";
}

}  // namespace
}  // namespace weft
