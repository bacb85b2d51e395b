#pragma once
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "core/error.h"

namespace weft::testing {

/// The message of the Error that `call` throws. The test fails if it throws none, or one of another kind.
inline std::string error_of(ErrorKind kind, const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_STREQ(to_string(error.kind()), to_string(kind)) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "no error was thrown";
  return "";
}

/// A function and not all in the macro: test files have hundreds of these, and compile in a third of the time.
[[gnu::noinline]] inline void expect_error(ErrorKind kind, const std::string& part, const std::function<void()>& call,
                                           const char* file, int line) {
  const ::testing::ScopedTrace trace(file, line, "");
  const std::string text = error_of(kind, call);
  EXPECT_NE(text.find(part), std::string::npos) << "in: " << text << "\nwanted: " << part;
}

/// Expects an Error of `kind` whose message holds `part`.
#define EXPECT_ERROR(kind, part, call) \
  ::weft::testing::expect_error(kind, part, [&] { (void)(call); }, __FILE__, __LINE__)

}  // namespace weft::testing
