// What ranks that share sequences ask of the kernels, on a CUDA device and on the CPU: attention whose keys come in
// parts is attention over all of them, and dropout of several pieces of a tensor has the mask of the whole.
#include <gtest/gtest.h>

#include <cmath>

#include "core/autograd.h"
#include "core/backend.h"
#include "ops/attention.h"
#include "ops/dropout.h"
#include "tests/error_of.h"
#include "tests/values.h"

namespace weft {
namespace {

using testing::random;

class Context : public ::testing::Test {
 protected:
  void SetUp() override {
    if (*why_no_cuda() != '\0') GTEST_SKIP() << why_no_cuda();
  }
};

struct Case {
  int64_t batch, queries, heads, kv_heads, head_size;
};

/// Keys of the first part, which the queries see up to their own place, `kOffset` of them before the first query; and
/// of the parts after it, which all of them see.
constexpr int64_t kOffset = 9;
constexpr int64_t kWhole[] = {37, 65};

struct Results {
  Tensor y, dq, dk, dv;
};

/// The parts in the order of their positions: those that are seen whole, then the first one.
Results by_parts(const Case& c, DType dtype, Device device) {
  const int64_t first = kOffset + c.queries, keys = kWhole[0] + kWhole[1] + first;
  const autograd::NoGrad no_grad;
  const auto input = [&](const char* name, int64_t tokens, int64_t heads) {
    // Every second head's columns are there to be left alone.
    return random({c.batch, tokens, heads, 2 * c.head_size}, dtype, name).to(device).narrow(3, 0, c.head_size);
  };
  const Tensor q = input("q", c.queries, c.heads), k = input("k", keys, c.kv_heads), v = input("v", keys, c.kv_heads),
               dy = input("dy", c.queries, c.heads);
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto sums = [&](const Tensor& like, double value) {
    Shape shape = like.shape();
    shape[3] = c.head_size + 3;
    return Tensor::full(shape, value, wide, device).narrow(3, 0, c.head_size);
  };
  const Tensor y = sums(q, NAN), lse = Tensor::full({c.batch, c.heads, c.queries}, NAN, wide, device);
  struct Piece {
    int64_t begin, count;
    bool first;
  };
  const Piece pieces[] = {{kWhole[0] + kWhole[1], first, true}, {0, kWhole[0], false}, {kWhole[0], kWhole[1], false}};
  const auto how = [&](const Piece& piece) {
    return AttentionPart{.scale = 1 / std::sqrt(static_cast<double>(c.head_size)),
                         .causal = piece.first,
                         .query_offset = piece.first ? kOffset : 0,
                         .resume = !piece.first};
  };
  for (const Piece& piece : pieces) {
    attention_part(q, k.narrow(1, piece.begin, piece.count), v.narrow(1, piece.begin, piece.count), how(piece), y, lse);
  }
  // Gradients are added to what is there.
  const Tensor dq = sums(q, 1), dk = sums(k, 1), dv = sums(v, 1), out = y.to(dtype);
  for (const Piece& piece : pieces) {
    const auto part = [&](const Tensor& x) { return x.narrow(1, piece.begin, piece.count); };
    attention_part_backward(q, part(k), part(v), how(piece), out, lse, dy, dq, part(dk), part(dv));
  }
  const auto result = [](const Tensor& x) { return x.contiguous().to(Device::cpu()); };
  return {result(y), result(dq), result(dk), result(dv)};
}

/// Attention over all keys in f64 on the CPU.
Results whole(const Case& c, DType dtype) {
  const int64_t before = kWhole[0] + kWhole[1] + kOffset;
  const auto input = [&](const char* name, int64_t tokens, int64_t heads) {
    const Tensor x = random({c.batch, tokens, heads, 2 * c.head_size}, dtype, name).narrow(3, 0, c.head_size);
    return x.to(DType::f64).contiguous().reshape({c.batch, tokens, heads * c.head_size});
  };
  const Tensor q = testing::leaf(input("q", c.queries, c.heads)),
               k = testing::leaf(input("k", before + c.queries, c.kv_heads)),
               v = testing::leaf(input("v", before + c.queries, c.kv_heads));
  const Tensor y = attention(q, k, v, {.heads = c.heads, .kv_heads = c.kv_heads, .query_offset = before});
  y.backward(input("dy", c.queries, c.heads));
  return {y.detach(), q.grad(), k.grad(), v.grad()};
}

double relative_error(const Tensor& got, const Tensor& want, double added) {
  const std::vector<double> a = got.to_vector<double>(), b = want.to_vector<double>();
  EXPECT_EQ(a.size(), b.size());
  double error = 0, size = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (a[i] - added - b[i]) * (a[i] - added - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(error / size);
}

TEST_F(Context, PartsOfAttentionAreTheWhole) {
  // Few queries and several tiles; heads that fit a tile's columns, odd ones, and wider than a block's columns.
  const Case cases[] = {{2, 5, 2, 1, 16},  {1, 3, 1, 1, 8},   {1, 150, 2, 2, 24},
                        {1, 70, 2, 1, 33}, {1, 40, 1, 1, 80}, {1, 20, 1, 1, 136}};
  for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16}) {
    // Of a norm: sums of 200 terms of two roundings each; weights and their gradients are rounded to 16 bits, which may
    // be three times that in gradients.
    const double unit = dtype == DType::f64   ? 0x1p-53
                        : dtype == DType::f32 ? 0x1p-24
                        : dtype == DType::f16 ? 0x1p-11
                                              : 0x1p-8;
    const double bound = is_float(dtype) && size_of(dtype) == 2 ? 3 * unit : 100 * unit;
    for (const Case& c : cases) {
      const Results want = whole(c, dtype);
      for (const Device device : {Device::cpu(), Device::cuda()}) {
        const Results got = by_parts(c, dtype, device);
        const auto check = [&](const char* name, const Tensor& a, const Tensor& b, double added) {
          EXPECT_LE(relative_error(a, b, added), bound)
              << name << ' ' << dtype << " on " << device << ", " << c.queries << " queries, D = " << c.head_size;
        };
        check("y", got.y, want.y, 0);
        check("dq", got.dq, want.dq, 1);
        check("dk", got.dk, want.dk, 1);
        check("dv", got.dv, want.dv, 1);
      }
    }
  }
}

TEST_F(Context, PartsOfAttentionHaveTheSameBitsTwice) {
  const Case c = {1, 70, 2, 1, 33};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Results one = by_parts(c, dtype, Device::cuda()), two = by_parts(c, dtype, Device::cuda());
    EXPECT_TRUE(testing::same_bits(one.y, two.y) && testing::same_bits(one.dq, two.dq));
    EXPECT_TRUE(testing::same_bits(one.dk, two.dk) && testing::same_bits(one.dv, two.dv));
  }
}

TEST_F(Context, PiecesOfATensorHaveTheMaskOfTheWhole) {
  const RandomStream stream(11, "dropout");
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    const Tensor x = random({2, 40, 7}, dtype, "x"), whole = dropout(x, 0.4, stream);
    // Tokens 3 to 9 and 30 to 39 of both rows: pieces that begin at any alignment.
    const auto take = [](const Tensor& t) { return cat({t.narrow(1, 3, 7), t.narrow(1, 30, 10)}, 1); };
    const std::vector<StreamRun> runs = {{49, 21}, {70, 210}, {49, 301}, {70, 490}};
    for (const Device device : {Device::cpu(), Device::cuda()}) {
      const Tensor part = testing::leaf(take(x).to(device));
      const Tensor y = dropout(part, 0.4, stream, true, runs);
      EXPECT_TRUE(testing::same_bits(y.detach().to(Device::cpu()), take(whole))) << dtype << " on " << device;
      y.backward(take(x).to(device));  // the derivative is the same function
      EXPECT_TRUE(testing::same_bits(part.grad().to(Device::cpu()), take(whole))) << dtype << " on " << device;
    }
  }
}

}  // namespace
}  // namespace weft
