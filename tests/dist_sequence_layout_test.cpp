// Which tokens a rank has: all of them once, the same work for all, and of others' keys those that causality leaves.
#include "dist/sequence_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/error_of.h"

namespace weft::dist {
namespace {

std::vector<int64_t> positions(const SequenceLayout& layout, int rank) {
  std::vector<int64_t> all;
  for (const IndexRange& range : layout.ranges(rank)) {
    for (int64_t i = range.begin; i < range.end; ++i) all.push_back(i);
  }
  return all;
}

TEST(SequenceLayout, TwoRanksHaveTheOuterAndTheInnerChunks) {
  const SequenceLayout layout(16, 2);
  EXPECT_EQ(layout.ranges(0), (std::array<IndexRange, 2>{{{0, 4}, {12, 16}}}));
  EXPECT_EQ(layout.ranges(1), (std::array<IndexRange, 2>{{{4, 8}, {8, 12}}}));
  EXPECT_EQ(SequenceLayout(7, 1).count(0), 7);
}

TEST(SequenceLayout, EveryTokenIsOnOneRank) {
  for (int ranks = 1; ranks <= 5; ++ranks) {
    for (int64_t tokens = 0; tokens <= 45; ++tokens) {
      const SequenceLayout layout(tokens, ranks);
      std::vector<int> holders(static_cast<size_t>(tokens));
      for (int rank = 0; rank < ranks; ++rank) {
        const std::vector<int64_t> mine = positions(layout, rank);
        EXPECT_EQ(static_cast<int64_t>(mine.size()), layout.count(rank));
        EXPECT_TRUE(std::is_sorted(mine.begin(), mine.end()));
        EXPECT_LE(layout.count(rank), (tokens + 2 * ranks - 1) / (2 * ranks) * 2);
        for (const int64_t i : mine) ++holders[static_cast<size_t>(i)];
      }
      EXPECT_EQ(std::count(holders.begin(), holders.end(), 1), tokens) << tokens << " on " << ranks;
    }
  }
}

TEST(SequenceLayout, AQuerySeesOfEachRankTheFirstTokensThatAreNotLater) {
  for (int ranks = 1; ranks <= 4; ++ranks) {
    for (const int64_t tokens : {1, 3, 8, 24, 37}) {
      const SequenceLayout layout(tokens, ranks);
      for (int rank = 0; rank < ranks; ++rank) {
        for (int range = 0; range < 2; ++range) {
          const IndexRange queries = layout.ranges(rank)[static_cast<size_t>(range)];
          if (queries.count() == 0) continue;
          for (int owner = 0; owner < ranks; ++owner) {
            const std::vector<int64_t> keys = positions(layout, owner);
            const auto seen = std::count_if(keys.begin(), keys.end(), [&](int64_t key) { return key < queries.end; });
            EXPECT_EQ(layout.keys_seen(rank, range, owner), seen);
            // Of another rank's, all queries of the range see the same ones.
            const auto first =
                std::count_if(keys.begin(), keys.end(), [&](int64_t key) { return key <= queries.begin; });
            EXPECT_TRUE(owner == rank || first == seen);
          }
        }
      }
    }
  }
}

TEST(SequenceLayout, EveryRankHasTheSameNumberOfPairs) {
  for (int ranks = 1; ranks <= 8; ++ranks) {
    for (const int64_t tokens : {16 * ranks, 6 * ranks + 5, 1000 * ranks + 3}) {
      const SequenceLayout layout(tokens, ranks);
      int64_t total = 0, least = INT64_MAX, most = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        int64_t counted = 0;
        for (const int64_t query : positions(layout, rank)) counted += query + 1;
        EXPECT_EQ(layout.pairs(rank), counted);
        total += counted, least = std::min(least, counted), most = std::max(most, counted);
      }
      EXPECT_EQ(total, tokens * (tokens + 1) / 2);
      // Chunks of one size: exactly equal. Else a rank has up to two tokens more, each of which sees at most all.
      EXPECT_LE(most - least, tokens % (2 * ranks) == 0 ? 0 : 2 * tokens) << tokens << " on " << ranks;
    }
  }
}

TEST(SequenceLayout, TakesARanksTokens) {
  const SequenceLayout layout(8, 2);
  const Tensor x = Tensor::arange(16).reshape({2, 8});
  EXPECT_EQ(layout.take(x, 1, 0).to_vector<int64_t>(), (std::vector<int64_t>{0, 1, 6, 7, 8, 9, 14, 15}));
  EXPECT_EQ(layout.take(x, 1, 1).to_vector<int64_t>(), (std::vector<int64_t>{2, 3, 4, 5, 10, 11, 12, 13}));
  EXPECT_ERROR(ErrorKind::kShape, "needs all 8 tokens along dimension 0", layout.take(x, 0, 0));
}

TEST(SequenceLayout, WhatMakesNoSenseIsNamed) {
  EXPECT_ERROR(ErrorKind::kValue, "tokens >= 0 and ranks >= 1, got -1 and 2", SequenceLayout(-1, 2));
  EXPECT_ERROR(ErrorKind::kValue, "got 4 and 0", SequenceLayout(4, 0));
  EXPECT_ERROR(ErrorKind::kIndex, "no rank 2 of 2", SequenceLayout(4, 2).ranges(2));
}

}  // namespace
}  // namespace weft::dist
