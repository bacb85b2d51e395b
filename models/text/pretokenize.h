#pragma once
#include <cstddef>
#include <string_view>
#include <vector>

namespace weft::text {

/// GPT-2's pre-tokenisation (Radford et al. 2019, encoder.py): the pieces between which byte-pair merges never reach,
/// found from left to right by
///
///   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+        (\s is Unicode White_Space)
///
/// by a hand-written scanner that equals the expression on every text of valid UTF-8. The classes are those of the
/// linked PCRE2. Bytes that are no valid UTF-8 are kept: each longest run of them is a piece of its own, and the text
/// on either side is taken as if it stood alone. The pieces put together are the text.
///
/// @return  the end of the piece that begins at `begin` < text.size(), a piece boundary. Linear in the piece's length.
size_t piece_end(std::string_view text, size_t begin);

/// All pieces of `text`, in order; they point into it.
std::vector<std::string_view> pretokenize(std::string_view text);

/// Cuts `text` into consecutive chunks of at least `size` bytes (but for the last) at places that are piece boundaries
/// whatever surrounds them (an ASCII space after an ASCII character that is none), so that the pieces of the chunks are
/// the pieces of the text. Depends on nothing but its arguments. Text without such places stays one chunk.
std::vector<std::string_view> split_at_boundaries(std::string_view text, size_t size);

}  // namespace weft::text
