#include "apps/option_value.h"

#include <charconv>
#include <cmath>
#include <system_error>

#include "core/error.h"

namespace weft::apps {
namespace {

constexpr double kExactInteger = 9007199254740992.0;  // 2^53: up to here every whole double is an integer of its own

bool is_digit(char c) { return c >= '0' && c <= '9'; }

std::string without_underscores(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '_') {
      out += text[i];
    } else if (i == 0 || i + 1 == text.size() || !is_digit(text[i - 1]) || !is_digit(text[i + 1])) {
      throw Refused{"an underscore may only stand between two digits"};
    }
  }
  return out;
}

/// Takes the suffix off `text` and returns the factor that it stands for.
uint64_t take_suffix(std::string_view& text) {
  struct Suffix {
    std::string_view name;
    uint64_t factor;
  };
  static constexpr Suffix kSuffixes[] = {
      {"Ki", 1ull << 10}, {"Mi", 1ull << 20}, {"Gi", 1ull << 30},   {"Ti", 1ull << 40},
      {"k", 1'000},       {"M", 1'000'000},   {"G", 1'000'000'000}, {"T", 1'000'000'000'000},
  };
  for (const Suffix& suffix : kSuffixes) {
    if (text.size() > suffix.name.size() && text.ends_with(suffix.name)) {
      text.remove_suffix(suffix.name.size());
      return suffix.factor;
    }
  }
  if (text.size() > 1 && text.ends_with("K")) throw Refused{"write k for 1,000 or Ki for 1,024"};
  return 1;
}

/// Exact: works on the decimal digits, never through a double.
int64_t parse_integer(std::string_view typed) {
  const Refused too_large{"it does not fit a 64-bit integer"};
  const std::string clean = without_underscores(typed);
  std::string_view text = clean;
  const uint64_t factor = take_suffix(text);
  size_t at = 0;
  const bool negative = !text.empty() && text[0] == '-';
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) at = 1;
  uint64_t digits = 0;
  int64_t shift = 0;  // the value is digits * 10^shift * factor
  int64_t zeros = 0;  // trailing zeros held back, so that 1.000000000000000000000 does not overflow
  bool any = false, point = false;
  for (; at < text.size() && (is_digit(text[at]) || (text[at] == '.' && !point)); ++at) {
    if (text[at] == '.') {
      if (!any || at + 1 == text.size() || !is_digit(text[at + 1])) throw Refused{};
      point = true;
      continue;
    }
    any = true;
    if (point) --shift;
    if (text[at] == '0') {
      ++zeros;
      continue;
    }
    if (digits == 0) zeros = 0;
    for (; zeros >= 0; --zeros) {
      if (__builtin_mul_overflow(digits, uint64_t{10}, &digits)) throw too_large;
    }
    zeros = 0;
    if (__builtin_add_overflow(digits, static_cast<uint64_t>(text[at] - '0'), &digits)) throw too_large;
  }
  if (!any) throw Refused{};
  shift += zeros;
  if (at < text.size() && (text[at] == 'e' || text[at] == 'E')) {
    std::string_view exponent = text.substr(at + 1);
    const bool plus = exponent.starts_with('+');
    if (plus) exponent.remove_prefix(1);
    int power = 0;
    const auto [end, error] = std::from_chars(exponent.data(), exponent.data() + exponent.size(), power);
    if (error == std::errc::result_out_of_range) throw too_large;
    if ((plus && exponent.starts_with('-')) || error != std::errc{} || end != exponent.data() + exponent.size())
      throw Refused{};
    shift += power;
    at = text.size();
  }
  if (at != text.size()) throw Refused{};
  if (digits == 0) return 0;
  if (__builtin_mul_overflow(digits, factor, &digits)) throw too_large;
  for (; shift > 0; --shift) {
    if (__builtin_mul_overflow(digits, uint64_t{10}, &digits)) throw too_large;
  }
  for (; shift < 0; ++shift) {
    if (digits % 10 != 0) throw Refused{"it is not a whole number"};
    digits /= 10;
  }
  const uint64_t limit = (uint64_t{1} << 63) - (negative ? 0 : 1);
  if (digits > limit) throw too_large;
  return static_cast<int64_t>(negative ? ~digits + 1 : digits);
}

double finite(double value) {
  if (std::isnan(value)) throw Refused{"it is NaN"};
  if (std::isinf(value)) throw Refused{"it is infinite"};
  return value;
}

double parse_number(std::string_view typed) {
  const std::string clean = without_underscores(typed);
  std::string_view text = clean;
  if (text.size() > 1 && text[0] == '+' && text[1] != '-') text.remove_prefix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::result_out_of_range) throw Refused{"it is outside the range of a 64-bit number"};
  if (error != std::errc{} || end != text.data() + text.size()) throw Refused{};
  return finite(value);
}

[[noreturn]] void wrong_type(const Given& value) { throw Refused{"it is " + type_of(value)}; }

}  // namespace

std::string type_of(const Given& value) {
  struct Name {
    std::string operator()(const Raw&) const { return "text"; }
    std::string operator()(const Other& other) const { return other.what; }
    std::string operator()(bool) const { return "a boolean"; }
    std::string operator()(int64_t) const { return "an integer"; }
    std::string operator()(double) const { return "a float"; }
    std::string operator()(const std::string&) const { return "a string"; }
    std::string operator()(const std::vector<Scalar>&) const { return "an array"; }
  };
  return std::visit(Name{}, value);
}

int64_t read_integer(const Given& value) {
  if (const auto* raw = std::get_if<Raw>(&value)) return parse_integer(raw->text);
  if (const auto* integer = std::get_if<int64_t>(&value)) return *integer;
  const auto* number = std::get_if<double>(&value);
  if (number == nullptr) wrong_type(value);
  if (std::trunc(finite(*number)) != *number) throw Refused{"it is not a whole number"};
  if (std::abs(*number) > kExactInteger) throw Refused{"a float above 2^53 is not exact: write the integer's digits"};
  return static_cast<int64_t>(*number);
}

double read_number(const Given& value) {
  if (const auto* raw = std::get_if<Raw>(&value)) return parse_number(raw->text);
  if (const auto* number = std::get_if<double>(&value)) return finite(*number);
  const auto* integer = std::get_if<int64_t>(&value);
  if (integer == nullptr) wrong_type(value);
  constexpr auto kLimit = static_cast<int64_t>(kExactInteger);
  if (*integer > kLimit || *integer < -kLimit) {
    throw Refused{"an integer above 2^53 is not exact as a number: write a float"};
  }
  return static_cast<double>(*integer);
}

bool read_bool(const Given& value) {
  if (const auto* boolean = std::get_if<bool>(&value)) return *boolean;
  const auto* raw = std::get_if<Raw>(&value);
  if (raw == nullptr) wrong_type(value);
  if (raw->text == "true" || raw->text == "1") return true;
  if (raw->text == "false" || raw->text == "0") return false;
  throw Refused{};
}

std::string read_text(const Given& value) {
  const auto* raw = std::get_if<Raw>(&value);
  const auto* string = std::get_if<std::string>(&value);
  if (raw == nullptr && string == nullptr) wrong_type(value);
  const std::string& text = raw != nullptr ? raw->text : *string;
  if (!valid_utf8(text)) throw Refused{"it is not valid UTF-8"};
  if (text.find('\0') != std::string::npos) throw Refused{"it holds a NUL character"};
  return text;
}

std::vector<Given> read_list(const Given& value) {
  std::vector<Given> items;
  if (const auto* array = std::get_if<std::vector<Scalar>>(&value)) {
    for (const Scalar& item : *array) std::visit([&](const auto& scalar) { items.emplace_back(scalar); }, item);
    return items;
  }
  const auto* raw = std::get_if<Raw>(&value);
  if (raw == nullptr) wrong_type(value);
  if (raw->text.empty()) return items;
  for (size_t begin = 0;;) {
    const size_t comma = raw->text.find(',', begin);
    items.emplace_back(Raw{raw->text.substr(begin, comma == std::string::npos ? comma : comma - begin)});
    if (comma == std::string::npos) return items;
    begin = comma + 1;
  }
}

bool valid_utf8(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  for (size_t at = 0; at < text.size();) {
    const unsigned lead = byte(at), second = byte(at + 1);
    size_t length = 0;
    if (lead < 0x80) length = 1;
    if (lead >= 0xc2 && lead <= 0xdf) length = 2;
    if (lead >= 0xe0 && lead <= 0xef) length = 3;
    if (lead >= 0xf0 && lead <= 0xf4) length = 4;
    if (length == 0 || (lead == 0xe0 && second < 0xa0) || (lead == 0xed && second > 0x9f) ||
        (lead == 0xf0 && second < 0x90) || (lead == 0xf4 && second > 0x8f)) {
      return false;
    }
    for (size_t i = 1; i < length; ++i) {
      if ((byte(at + i) & 0xc0) != 0x80) return false;
    }
    at += length;
  }
  return true;
}

std::string shortest(double value) {
  char buffer[32];
  std::string text(buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr);
  // to_chars pads exponents to two digits: 3e-04.
  const size_t exponent = text.find('e');
  if (exponent != std::string::npos && text[exponent + 2] == '0') text.erase(exponent + 2, 1);
  return text;
}

std::string toml_literal(bool value) { return value ? "true" : "false"; }

std::string toml_literal(int64_t value) { return std::to_string(value); }

std::string toml_literal(double value) {
  std::string text = shortest(value);
  if (text.find_first_not_of("-0123456789") == std::string::npos) text += ".0";
  return text;
}

std::string toml_literal(std::string_view value) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : value) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (byte < 0x20 || byte == 0x7f) {
      out += "\\u00";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string shown(const Given& value) {
  struct Show {
    std::string operator()(const Raw& raw) const { return weft::quoted(raw.text); }
    std::string operator()(const Other& other) const { return other.what; }
    std::string operator()(bool boolean) const { return toml_literal(boolean); }
    std::string operator()(int64_t integer) const { return toml_literal(integer); }
    std::string operator()(double number) const { return toml_literal(number); }
    std::string operator()(const std::string& text) const { return weft::quoted(text); }
    std::string operator()(const std::vector<Scalar>& items) const {
      std::string out = "[";
      for (size_t i = 0; i < items.size(); ++i) {
        if (out.size() > 80) return out + ", ...]";
        out += (i == 0 ? "" : ", ") + std::visit(*this, items[i]);
      }
      return out + "]";
    }
  };
  return std::visit(Show{}, value);
}

}  // namespace weft::apps
