#pragma once
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "models/checkpoint/checkpoint.h"

namespace weft::testing {

/// Compares two checkpoints' tensors by name and bit for bit, whatever files hold them, and where the runs stood.
inline void expect_same_checkpoint(const std::string& path, const std::string& expected_path) {
  const ::testing::ScopedTrace trace(__FILE__, __LINE__, path);
  const OpenCheckpoint expected = open_checkpoint(expected_path), got = open_checkpoint(path);
  EXPECT_EQ(got.manifest.data_cursor, expected.manifest.data_cursor);
  EXPECT_EQ(got.manifest.state, expected.manifest.state);
  for (const auto& [a, b] : {std::pair(&expected.model, &got.model), std::pair(&expected.optimizer, &got.optimizer)}) {
    ASSERT_GT(a->tensors().size(), 10u);
    ASSERT_EQ(a->tensors().size(), b->tensors().size());
    for (const CheckpointTensor& each : a->tensors()) {
      ASSERT_TRUE(b->contains(each.name)) << each.name;
      const Tensor x = a->load(each.name), y = b->load(each.name);
      ASSERT_EQ(x.describe(), y.describe()) << each.name;
      EXPECT_EQ(std::memcmp(x.raw(), y.raw(), static_cast<size_t>(x.numel() * size_of(x.dtype()))), 0) << each.name;
    }
  }
}

}  // namespace weft::testing
