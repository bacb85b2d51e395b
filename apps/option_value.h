#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace weft::apps {

/// A value as it was typed on the command line or in an environment variable: its type is the option's.
struct Raw {
  std::string text;
};

/// A TOML value that no option takes: a table, a date, a nested array.
struct Other {
  std::string what;  ///< "a table"
};

/// One element of a TOML array.
using Scalar = std::variant<bool, int64_t, double, std::string>;

/// What a source says an option's value is, before the option's type and range are checked.
using Given = std::variant<Raw, Other, bool, int64_t, double, std::string, std::vector<Scalar>>;

/// Thrown by the readers below: why a value is not of the type asked for. Options turns it into an Error that names the
/// place and the rule.
struct Refused {
  std::string detail;  ///< "it is a string", or empty where the rule says it all
};

/// "a string", "an integer", ...: for messages.
std::string type_of(const Given& value);

/// Whole number. Text: digits with `_` between them (1_000), a decimal fraction and exponent whose value is whole (1e6,
/// 2.5e3), and one suffix: k, M, G, T for powers of 1,000, Ki, Mi, Gi, Ti for powers of 1,024 (64Ki, 1.5M). TOML: an
/// integer, or a float that is whole and at most 2^53 in size. No rounding: what does not fit 64 bits exactly is
/// refused.
int64_t read_integer(const Given& value);

/// Finite number: text as for a TOML float (no inf, nan or hexadecimal); TOML integers up to 2^53 in size are taken
/// too.
double read_number(const Given& value);

/// true or false; as text also 1 and 0.
bool read_bool(const Given& value);

/// Text in valid UTF-8 without NUL, which is what a TOML file and a path can both hold.
std::string read_text(const Given& value);

/// The elements of a list; text is split at commas, and empty text is an empty list.
std::vector<Given> read_list(const Given& value);

/// True for well-formed UTF-8 (no overlong forms, no surrogates, nothing above U+10FFFF).
bool valid_utf8(std::string_view text);

/// Shortest text that reads back as the same number: "0.001", "3e-5", "3".
std::string shortest(double value);

/// The same as TOML literals. A number always has a point or an exponent, so that it stays a float.
std::string toml_literal(bool value);
std::string toml_literal(int64_t value);
std::string toml_literal(double value);
std::string toml_literal(std::string_view value);

/// Any Given, for messages: text in quotes, the rest as TOML.
std::string shown(const Given& value);

}  // namespace weft::apps
