#include "ops/attention.h"
#include "tests/op_cases.h"

namespace weft::testing {
namespace {

constexpr const char* kReason =
    "f32: scores are sums of D products up to 4 with roundings of 6e-8 each, and an error of a score is a relative "
    "error of "
    "its weight; bf16: computed in f32 from rounded inputs, rounded once";

OpCase causal_case(const char* name, int64_t batch, int64_t tokens, int64_t heads, int64_t head_size) {
  const int64_t channels = heads * head_size;
  return {.op = "causal_attention",
          .name = name,
          .arguments = {{{batch, tokens, 3 * channels}}},
          .run = [heads](const Tensors& in) -> Tensors { return {causal_attention(in[0], heads)}; },
          .composed = [heads, channels](const Tensors& in) -> Tensors {
            const Tensor& qkv = in[0];
            return {attention_composed(qkv.narrow(-1, 0, channels), qkv.narrow(-1, channels, channels),
                                       qkv.narrow(-1, 2 * channels, channels), {.heads = heads})};
          },
          .reason = kReason};
}

/// q [batch, queries, ...] over k and v [batch, keys, ...], packed (three dimensions) or by heads (four).
struct Sizes {
  int64_t batch, queries, keys, head_size;
  bool packed = true;
};

OpCase attention_case(const char* name, const Sizes& s, const AttentionOptions& options) {
  const int64_t heads = options.heads, kv_heads = options.kv_heads == 0 ? heads : options.kv_heads;
  const Shape q =
      s.packed ? Shape{s.batch, s.queries, heads * s.head_size} : Shape{s.batch, heads, s.queries, s.head_size};
  const Shape k =
      s.packed ? Shape{s.batch, s.keys, kv_heads * s.head_size} : Shape{s.batch, kv_heads, s.keys, s.head_size};
  return {.op = "attention",
          .name = name,
          .arguments = {{q}, {k}, {k}},
          .run = [options](const Tensors& in) -> Tensors { return {attention(in[0], in[1], in[2], options)}; },
          .composed = [options](const Tensors& in) -> Tensors {
            return {attention_composed(in[0], in[1], in[2], options)};
          },
          .reason = kReason};
}

}  // namespace

std::vector<OpCase> attention_cases() {
  return {
      causal_case("two_heads_of_eight", 2, 7, 2, 8),
      causal_case("one_token", 2, 1, 2, 3),
      causal_case("few_tokens", 1, 4, 2, 8),
      causal_case("one_element_a_head", 1, 6, 3, 1),
      causal_case("three_elements_a_head", 2, 17, 1, 3),
      causal_case("thirty_two_elements_a_head", 1, 33, 2, 32),
      causal_case("sixty_four_elements_a_head", 1, 19, 1, 64),
      causal_case("one_tile", 1, 64, 1, 4),
      causal_case("beyond_one_tile", 1, 67, 2, 5),
      causal_case("prime_tokens", 1, 131, 1, 2),
      causal_case("no_batch", 0, 5, 2, 4),
      causal_case("no_tokens", 2, 0, 2, 4),
      attention_case("grouped_queries", {2, 9, 9, 4}, {.heads = 4, .kv_heads = 2}),
      attention_case("one_key_head", {1, 70, 70, 3}, {.heads = 3, .kv_heads = 1}),
      attention_case("one_query_over_a_cache", {2, 1, 75, 5}, {.heads = 4, .kv_heads = 2, .query_offset = 74}),
      attention_case("three_queries_over_a_cache", {1, 3, 12, 16}, {.heads = 2, .query_offset = 9}),
      attention_case("many_queries_over_a_cache", {1, 20, 90, 4}, {.heads = 2, .query_offset = 70}),
      attention_case("positions_beyond_the_keys", {1, 6, 5, 4}, {.heads = 1, .query_offset = 3}),
      attention_case("fewer_queries_than_keys", {1, 6, 11, 4}, {.heads = 1}),
      attention_case("all_keys", {2, 7, 67, 4}, {.heads = 2, .causal = false}),
      attention_case("two_queries_over_all_keys", {1, 2, 9, 4}, {.heads = 2, .causal = false}),
      attention_case("scaled", {1, 8, 8, 4}, {.heads = 2, .scale = -0.3}),
      attention_case("by_heads", {2, 6, 8, 4, false}, {.heads = 4, .kv_heads = 2, .query_offset = 2}),
      attention_case("by_heads_one_element", {1, 5, 5, 1, false}, {.heads = 2}),
      attention_case("no_queries", {1, 0, 3, 4}, {.heads = 2}),
  };
}

}  // namespace weft::testing
