// Which rank keeps what: every element once, in even shares, cut where blocks end.
#include "dist/shard_layout.h"

#include <gtest/gtest.h>

#include <numeric>

#include "tests/error_of.h"

namespace weft::dist {
namespace {

std::vector<size_t> all_of(const std::vector<int64_t>& sizes) {
  std::vector<size_t> all(sizes.size());
  std::iota(all.begin(), all.end(), size_t{0});
  return all;
}

const std::vector<std::vector<int64_t>> kModels = {
    {}, {0}, {1}, {7}, {1024}, {5, 0, 3}, {768 * 768, 768, 3072 * 768, 3072, 13, 0, 50257 * 5}, {1, 1, 1, 1, 1, 1, 1}};

TEST(ShardLayout, EveryElementHasOneRank) {
  for (const auto& sizes : kModels) {
    for (int ranks = 1; ranks <= 9; ++ranks) {
      for (const int64_t align : {1, 64, 1024}) {
        const ShardBucket bucket(all_of(sizes), sizes, ranks, align);
        EXPECT_EQ(bucket.elements(), std::accumulate(sizes.begin(), sizes.end(), int64_t{0}));
        std::vector<int64_t> next(sizes.size(), 0);
        for (int rank = 0; rank < ranks; ++rank) {
          int64_t count = 0;
          for (const ShardPiece& piece : bucket.pieces(rank)) {
            EXPECT_EQ(piece.begin, next[piece.tensor]);
            EXPECT_LT(piece.begin, piece.end);
            EXPECT_EQ(piece.begin % align, 0);
            next[piece.tensor] = piece.end;
            count += piece.count();
          }
          EXPECT_EQ(count, bucket.count(rank));
          EXPECT_EQ(count, bucket.counts()[static_cast<size_t>(rank)]);
        }
        EXPECT_EQ(next, sizes);
      }
    }
  }
}

TEST(ShardLayout, SharesAreEvenButForABlock) {
  const std::vector<int64_t> sizes = {768 * 768, 768, 3072 * 768, 3072, 13, 0, 50257 * 5};
  for (int ranks = 1; ranks <= 16; ++ranks) {
    const ShardBucket bucket(all_of(sizes), sizes, ranks, 1024);
    for (int rank = 0; rank < ranks; ++rank) {
      EXPECT_LE(std::abs(bucket.count(rank) - bucket.elements() / ranks), 1024 + 1) << ranks << " ranks";
    }
  }
}

TEST(ShardLayout, SpacedTensorsBeginAtMultiples) {
  for (const auto& sizes : kModels) {
    for (int ranks = 1; ranks <= 9; ++ranks) {
      const ShardBucket bucket(all_of(sizes), sizes, ranks, 1024, 64);
      std::vector<int64_t> next(sizes.size(), 0);
      for (int rank = 0; rank < ranks; ++rank) {
        bucket.for_each_piece(rank, [&](const ShardPiece& piece, int64_t at) {
          EXPECT_EQ(bucket.start(piece.tensor) % 64, 0);
          EXPECT_EQ(bucket.cut(rank) + at, bucket.start(piece.tensor) + piece.begin);
          EXPECT_LE(at + piece.count(), bucket.count(rank));
          EXPECT_EQ(piece.begin, next[piece.tensor]);
          EXPECT_EQ(piece.begin % 1024, 0);
          next[piece.tensor] = piece.end;
        });
      }
      EXPECT_EQ(next, sizes);
      EXPECT_LT(bucket.elements(),
                std::accumulate(sizes.begin(), sizes.end(), int64_t{1}) + 64 * static_cast<int64_t>(sizes.size()));
    }
  }
}

TEST(ShardLayout, MoreRanksThanElementsLeaveSomeWithNothing) {
  const std::vector<int64_t> sizes = {2, 1};
  const ShardBucket bucket(all_of(sizes), sizes, 8, 1);
  const std::vector<int64_t> counts = bucket.counts();
  EXPECT_EQ(counts.size(), 8u);
  EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), int64_t{0}), 3);
}

TEST(ShardLayout, BucketsGoFromTheLastTensorToTheFirst) {
  const std::vector<int64_t> sizes = {10, 20, 30, 5, 5}, widths = {4, 4, 4, 4, 4};
  EXPECT_EQ(transfer_buckets(sizes, widths, 160), (std::vector<std::vector<size_t>>{{4, 3, 2}, {1, 0}}));
  EXPECT_EQ(transfer_buckets(sizes, widths, 1), (std::vector<std::vector<size_t>>{{4}, {3}, {2}, {1}, {0}}));
  EXPECT_EQ(transfer_buckets(sizes, std::vector<int64_t>{4, 4, 2, 2, 2}, 1000),
            (std::vector<std::vector<size_t>>{{4, 3, 2}, {1, 0}}));
  EXPECT_TRUE(transfer_buckets({}, {}, 100).empty());
}

TEST(ShardLayout, WhatMakesNoSenseIsRefused) {
  const std::vector<int64_t> sizes = {4, -1};
  EXPECT_ERROR(ErrorKind::kValue, "ranks must be at least 1", ShardBucket({0}, sizes, 0, 1));
  EXPECT_ERROR(ErrorKind::kValue, "align must be at least 1", ShardBucket({0}, sizes, 1, 0));
  EXPECT_ERROR(ErrorKind::kValue, "a multiple of a spacing of at least 1, got 8 and 3",
               ShardBucket({0}, sizes, 1, 8, 3));
  EXPECT_ERROR(ErrorKind::kValue, "a multiple of a spacing", ShardBucket({0}, sizes, 1, 8, 0));
  EXPECT_ERROR(ErrorKind::kValue, "tensor 1 has a negative size", ShardBucket({1}, sizes, 1, 1));
  EXPECT_ERROR(ErrorKind::kIndex, "there are 2 tensors, and 2", ShardBucket({2}, sizes, 1, 1));
  EXPECT_ERROR(ErrorKind::kValue, "at least 1 byte", transfer_buckets({}, {}, 0));
}

}  // namespace
}  // namespace weft::dist
