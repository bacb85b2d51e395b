#include "core/shared_library.h"

#include <gtest/gtest.h>

#include "tests/error_of.h"

namespace weft::testing {
namespace {

TEST(SharedLibrary, FunctionsOfTheFirstThatThereIsAreFound) {
  const SharedLibrary library("maths", {"libweft_none.so.1", "libm.so.6"});
  ASSERT_TRUE(library.found());
  double (*cosine)(double) = nullptr;
  library.require(cosine, "cos");
  EXPECT_EQ(cosine(0), 1);
  EXPECT_EQ(library.find<double(double)>("cos"), cosine);
}

TEST(SharedLibrary, OneThatIsNotThereIsAnErrorOnlyForWhoNeedsItAndNamesAllThatWasTried) {
  const SharedLibrary library("maths", {"libweft_none.so.1", "/nowhere/libweft_none.so"});
  EXPECT_FALSE(library.found());
  EXPECT_EQ(library.find<double(double)>("cos"), nullptr);
  double (*cosine)(double) = nullptr;
  for (const char* part : {"[maths] the library is needed and was not found", "libweft_none.so.1: cannot open",
                           "/nowhere/libweft_none.so: cannot open", "LD_LIBRARY_PATH"}) {
    EXPECT_ERROR(ErrorKind::kDevice, part, library.require(cosine, "cos"));
  }
}

TEST(SharedLibrary, AFunctionThatTheLibraryLacksIsNamed) {
  const SharedLibrary library("maths", {"libm.so.6"});
  double (*function)(double) = nullptr;
  EXPECT_EQ(library.find<double(double)>("weft_none"), nullptr);
  EXPECT_ERROR(ErrorKind::kDevice, "[maths] libm.so.6 has no weft_none", library.require(function, "weft_none"));
}

}  // namespace
}  // namespace weft::testing
