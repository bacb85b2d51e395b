#pragma once
#include <gtest/gtest.h>

#include <string>

#include "core/error.h"

namespace weft::testing {

/// The message of the Error that `call` throws. The test fails if it throws none, or one of another kind.
template <class Call>
std::string error_of(ErrorKind kind, Call call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_STREQ(to_string(error.kind()), to_string(kind)) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "no error was thrown";
  return "";
}

/// Expects an Error of `kind` whose message holds `part`.
#define EXPECT_ERROR(kind, part, call)                                                     \
  do {                                                                                     \
    const std::string error_text = ::weft::testing::error_of(kind, [&] { (void)(call); }); \
    EXPECT_NE(error_text.find(part), std::string::npos) << error_text;                     \
  } while (false)

}  // namespace weft::testing
