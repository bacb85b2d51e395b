#include "apps/text_stream.h"

#include <algorithm>

#include "apps/option_value.h"

namespace weft::apps {
namespace {

/// Bytes of the character that `lead` begins, or 0 if it begins none.
size_t length_of(unsigned char lead) {
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  if (lead >= 0xf0 && lead <= 0xf4) return 4;
  return 0;
}

/// Whether bytes exist that would complete `begin`, a proper prefix of a character, as valid UTF-8.
bool may_be_completed(std::string_view begin, size_t length) {
  // The second byte decides (overlong forms, surrogates, beyond U+10FFFF); continuation bytes 0x80 and 0xbf are the
  // extremes, so that one of them completes whatever can be completed.
  for (const char filler : {'\x80', '\xbf'}) {
    std::string whole(begin);
    whole.resize(length, filler);
    if (valid_utf8(whole)) return true;
  }
  return false;
}

}  // namespace

std::string TextStream::take_characters(bool last) {
  static constexpr std::string_view kReplacement = "\xef\xbf\xbd";
  std::string out;
  size_t at = 0;
  while (at < characters_.size()) {
    const size_t length = length_of(static_cast<unsigned char>(characters_[at]));
    const std::string_view rest = std::string_view(characters_).substr(at, std::max<size_t>(length, 1));
    if (length > 0 && rest.size() == length && valid_utf8(rest)) {
      out += rest;
      at += length;
    } else if (length > rest.size() && may_be_completed(rest, length) && !last) {
      break;
    } else {
      out += kReplacement;
      ++at;
    }
  }
  characters_.erase(0, at);
  return out;
}

std::string TextStream::push(std::string_view bytes) {
  if (stopped_) return "";
  raw_ += bytes;
  size_t certain = raw_.size();
  if (!stop_.empty()) {
    certain = raw_.find(stop_);
    stopped_ = certain != std::string::npos;
    if (!stopped_) {
      size_t held = std::min(stop_.size() - 1, raw_.size());
      while (!raw_.ends_with(std::string_view(stop_).substr(0, held))) --held;
      certain = raw_.size() - held;
    }
  }
  characters_.append(raw_, 0, certain);
  raw_.erase(0, certain);
  if (stopped_) raw_.clear();
  return take_characters(stopped_);
}

std::string TextStream::finish() {
  characters_ += raw_;
  raw_.clear();
  return take_characters(true);
}

}  // namespace weft::apps
