#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace weft::text {

/// Interpolated Kneser-Ney n-gram model (Kneser & Ney 1995; Chen & Goodman 1999, section 3.6): the baseline that a
/// neural language model on the same tokens has to beat. For a context h of k - 1 tokens, h' being h without its
/// oldest,
///
///   p_k(w | h) = (max(c_k(h w) - D_k, 0) + D_k * |{v : c_k(h v) > 0}| * p_{k-1}(w | h')) / sum_v c_k(h v)
///   p_0(w)     = 1 / V,    p_k(w | h) = p_{k-1}(w | h') where h was never seen
///
/// c_order counts n-grams; for k < order, c_k(g) is the number of different tokens (or the beginning) seen before g.
/// One discount an order, D_k = n1 / (n1 + 2 n2), where n1 and n2 n-grams have a count of 1 and 2 (0.5 if n1 is 0). D_k
/// > 0 and p_0 give every token some mass.
///
/// N-grams are kept in sorted arrays: about 12 bytes for each distinct n-gram and each distinct context of every order,
/// plus 32 bytes a token while training. Time O(order * n log n).
class KneserNey {
 public:
  /// @param tokens      at least one, at most 2^32 - 2, each in [0, vocab_size)
  /// @param vocab_size  V, from 1 to 2^31 - 1
  /// @param order       n-grams up to this length: the context is order - 1 tokens; from 1 to 32
  /// @throws Error  kValue, kIndex.
  KneserNey(std::span<const int32_t> tokens, int64_t vocab_size, int order = 5);

  /// p(token | context). Of the context, the last order - 1 tokens count; it may be shorter or empty.
  /// @throws Error  kIndex if a token is not in [0, V).
  double probability(std::span<const int32_t> context, int32_t token) const;

  /// Mean of -ln p(token | tokens before it) over all of `tokens`, in nats a token; the first ones have a short
  /// context. Bits per byte of the text are nats * tokens / (ln 2 * bytes).
  /// @throws Error  kValue if there are no tokens; kIndex.
  double nats_per_token(std::span<const int32_t> tokens) const;

  int order() const { return static_cast<int>(orders_.size()); }
  int64_t vocab_size() const { return vocab_size_; }
  /// D_k, k from 1 to order().
  double discount(int k) const;
  /// Distinct n-grams of length k, from 1 to order().
  int64_t ngrams(int k) const;

 private:
  /// The k-grams for one k. A context is known by its index in the sorted `contexts`, whose keys are (index of the
  /// context without its oldest token in order k - 1, oldest token); k = 1 has the empty context alone, with index 0.
  struct Order {
    std::vector<uint64_t> contexts;
    std::vector<uint64_t> grams;   ///< sorted keys (context, token)
    std::vector<uint32_t> counts;  ///< c_k of grams
    std::vector<uint32_t> first;   ///< of each context: its first place in grams; one more at the end
    std::vector<uint64_t> totals;  ///< of each context: the sum of its counts
    double discount = 0;
  };

  double probability_unchecked(const int32_t* end, int64_t available, int32_t token) const;

  std::vector<Order> orders_;
  int64_t vocab_size_;
};

}  // namespace weft::text
