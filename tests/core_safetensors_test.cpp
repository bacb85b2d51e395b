#include "core/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <random>

namespace weft {
namespace {

namespace fs = std::filesystem;
using Named = std::vector<std::pair<std::string, Tensor>>;

class Safetensors : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "weft-safetensors-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string at(const std::string& name) const { return (folder_ / name).string(); }

  fs::path folder_;
};

/// The message of the Error that `call` throws; its kind must be `kind`.
template <class Call>
std::string message_of(ErrorKind kind, Call call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(to_string(error.kind()), std::string(to_string(kind))) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

/// A file with this header, `bytes` of zeros as data, and `length` (if not -1) as the length it claims for its header.
std::string file_with(const std::string& header, size_t bytes, int64_t length = -1) {
  const uint64_t claimed = length == -1 ? header.size() : static_cast<uint64_t>(length);
  std::string file(8, '\0');
  std::memcpy(file.data(), &claimed, 8);
  return file + header + std::string(bytes, '\0');
}

/// The bytes of a contiguous tensor.
std::string bytes_of(const Tensor& tensor) {
  return {static_cast<const char*>(tensor.raw()), static_cast<size_t>(tensor.numel() * size_of(tensor.dtype()))};
}

/// A tensor of every type and of awkward shapes, with all byte values in the types that allow them.
Named samples() {
  Named all;
  uint32_t seed = 1;
  for (const auto& [kind, shape] : std::vector<std::pair<std::string, Shape>>{
           {"scalar", {}}, {"empty", {3, 0, 2}}, {"vector", {7}}, {"cube", {2, 3, 5}}, {"six", {1, 2, 1, 2, 1, 3}}}) {
    for (int i = 0; i < kDTypeCount; ++i) {
      const auto dtype = static_cast<DType>(i);
      Tensor tensor = Tensor::empty(shape, dtype);
      auto* data = static_cast<unsigned char*>(tensor.raw());
      for (int64_t b = 0; b < tensor.numel() * size_of(dtype); ++b) {
        seed = seed * 1664525 + 1013904223;
        data[b] = static_cast<unsigned char>(dtype == DType::boolean ? seed >> 31 : seed >> 24);
      }
      all.emplace_back(kind + "." + name(dtype), tensor);
    }
  }
  return all;
}

TEST_F(Safetensors, RoundTripsEveryTypeAndShapeBitForBit) {
  const Named written = samples();
  const std::map<std::string, std::string> metadata = {{"format", "weft"}, {"", "empty key"}, {"quote\"\n", "\u00e9"}};
  save_safetensors(at("a"), written, metadata);
  const SafetensorsFile file(at("a"));
  EXPECT_EQ(file.metadata(), metadata);
  ASSERT_EQ(file.tensors().size(), written.size());
  for (const auto& [name, tensor] : written) {
    const Tensor read = file.load(name);
    EXPECT_EQ(read.describe(), tensor.describe()) << name;
    EXPECT_EQ(bytes_of(read), bytes_of(tensor)) << name;
    const Tensor into = Tensor::empty_like(tensor);
    file.load_into(name, into);
    EXPECT_EQ(bytes_of(into), bytes_of(tensor)) << name;
  }
}

TEST_F(Safetensors, KeepsTheBitsOfNaNsInfinitiesAndNegativeZero) {
  const std::vector<float> odd = {NAN, -NAN, INFINITY, -INFINITY, -0.0f, std::numeric_limits<float>::denorm_min()};
  const Tensor tensor = Tensor::from(odd, {6});
  save_safetensors(at("a"), Named{{"x", tensor}});
  EXPECT_EQ(bytes_of(SafetensorsFile(at("a")).load("x")), bytes_of(tensor));
}

TEST_F(Safetensors, WritesTheSameBytesForAnyOrderOfTensors) {
  Named tensors = samples();
  const std::string hash = save_safetensors(at("a"), tensors);
  std::shuffle(tensors.begin(), tensors.end(), std::mt19937(3));
  EXPECT_EQ(save_safetensors(at("b"), tensors), hash);
  EXPECT_EQ(read_file(at("a")), read_file(at("b")));
  EXPECT_EQ(hash, hash_file(at("a")));
}

TEST_F(Safetensors, WritesExactlyTheDocumentedBytes) {
  const Named tensors = {{"b", Tensor::from(std::vector<uint8_t>{1, 2}, {2})},
                         {"w", Tensor::from(std::vector<int32_t>{-1}, {1, 1})},
                         {"a", Tensor::from(std::vector<uint8_t>{9}, {})}};
  save_safetensors(at("a"), tensors, {{"k", "value"}});
  std::string header =
      R"({"__metadata__":{"k":"value"},"w":{"dtype":"I32","shape":[1,1],"data_offsets":[0,4]},)"
      R"("a":{"dtype":"U8","shape":[],"data_offsets":[4,5]},"b":{"dtype":"U8","shape":[2],"data_offsets":[5,7]}})";
  ASSERT_EQ(header.size(), 188u);
  header.resize(256 - 8, ' ');
  EXPECT_EQ(read_file(at("a")), file_with(header, 0) + std::string("\xff\xff\xff\xff\x09\x01\x02", 7));
}

TEST_F(Safetensors, AlignsTheDataAndEveryTensorInIt) {
  save_safetensors(at("a"), samples());
  const std::string content = read_file(at("a"));
  const SafetensorsHeader header = parse_safetensors(as_bytes(content), "a");
  EXPECT_EQ(header.data_begin % 64, 0);
  for (const SafetensorsEntry& entry : header.tensors) EXPECT_EQ(entry.begin % size_of(entry.dtype), 0) << entry.name;
}

TEST_F(Safetensors, WritesAFileWithoutTensors) {
  save_safetensors(at("a"), Named{});
  EXPECT_TRUE(SafetensorsFile(at("a")).tensors().empty());
  EXPECT_EQ(fs::file_size(at("a")), 64u);
}

TEST_F(Safetensors, WritesViewsInRowMajorOrder) {
  const Tensor matrix = Tensor::arange(6, DType::i32).reshape({2, 3});
  save_safetensors(at("a"), Named{{"t", matrix.transpose(0, 1)}, {"s", matrix.slice(1, 1, 3)}});
  const SafetensorsFile file(at("a"));
  EXPECT_EQ(file.load("t").to_vector<int32_t>(), (std::vector<int32_t>{0, 3, 1, 4, 2, 5}));
  EXPECT_EQ(file.load("s").to_vector<int32_t>(), (std::vector<int32_t>{1, 2, 4, 5}));
}

TEST_F(Safetensors, WritesLargeTensorsBesideSmallOnes) {
  // Above and below the size at which writes are gathered.
  Named tensors;
  for (const int64_t n : {1, 100'000, 3, 3'000'000, 5, 120'000, 7}) {
    tensors.emplace_back("n" + std::to_string(n), Tensor::arange(n, DType::i32));
  }
  const std::string hash = save_safetensors(at("a"), tensors);
  EXPECT_EQ(hash, hash_file(at("a")));
  const SafetensorsFile file(at("a"));
  for (const auto& [name, tensor] : tensors) EXPECT_EQ(bytes_of(file.load(name)), bytes_of(tensor)) << name;
}

TEST_F(Safetensors, PiecesOfAnySizeMakeTheSameFile) {
  Named tensors = samples();
  tensors.emplace_back("large", Tensor::arange(200'003).to(DType::f32));
  tensors.emplace_back("turned", Tensor::arange(60'000).to(DType::f64).reshape({200, 300}).transpose(0, 1));
  const std::string hash = save_safetensors(at("a"), tensors, {{"k", "value"}});
  const std::string bytes = read_file(at("a"));
  for (const size_t piece :
       {size_t{1'001}, size_t{65'536}, size_t{300'000}, bytes.size() - 1, bytes.size(), bytes.size() + 1}) {
    SafetensorsWriter writer(at("b"), tensors, {{"k", "value"}});
    EXPECT_NE(message_of(ErrorKind::kState, [&] { writer.commit(); }).find("before everything"), std::string::npos);
    size_t calls = 1;
    for (; writer.write(piece); ++calls) writer.write_back();
    EXPECT_EQ(calls, (bytes.size() + piece - 1) / piece);
    EXPECT_FALSE(writer.write(piece));
    EXPECT_EQ(writer.commit(), hash);
    EXPECT_TRUE(read_file(at("b")) == bytes) << piece;
  }
  {
    SafetensorsWriter writer(at("c"), tensors);
    writer.write(100'000);
  }
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 2);
}

TEST_F(Safetensors, LoadsIntoViewsAndParameters) {
  save_safetensors(at("a"), Named{{"x", Tensor::arange(6, DType::f32).reshape({2, 3})}});
  const SafetensorsFile file(at("a"));
  const Tensor wide = Tensor::zeros({2, 5});
  file.load_into("x", wide.slice(1, 1, 4));
  EXPECT_EQ(wide.to_vector<float>(), (std::vector<float>{0, 0, 1, 2, 0, 0, 3, 4, 5, 0}));
  Tensor parameter = Tensor::zeros({2, 3}).requires_grad_();
  file.load_into("x", parameter);
  EXPECT_EQ(parameter.detach().to_vector<float>(), (std::vector<float>{0, 1, 2, 3, 4, 5}));
  EXPECT_TRUE(parameter.requires_grad());
}

TEST_F(Safetensors, AMovedFileStillLoads) {
  save_safetensors(at("a"), Named{{"x", Tensor::arange(3)}, {"y", Tensor::arange(4)}});
  SafetensorsFile file(at("a"));
  const SafetensorsFile moved = std::move(file);
  EXPECT_EQ(moved.load("y").to_vector<int64_t>(), (std::vector<int64_t>{0, 1, 2, 3}));
}

TEST_F(Safetensors, RefusesTensorsThatDoNotFitTheProgram) {
  save_safetensors(at("a"), Named{{"h.0.weight", Tensor::zeros({2, 3})}});
  const SafetensorsFile file(at("a"));
  EXPECT_EQ(message_of(ErrorKind::kData, [&] { file.load("h.0.weights"); }),
            "[load_safetensors] " + at("a") +
                ": there is no tensor \"h.0.weights\" among its 1; did you mean \"h.0.weight\"?");
  EXPECT_EQ(message_of(ErrorKind::kData, [&] { file.load_into("h.0.weight", Tensor::zeros({3, 2})); }),
            "[load_safetensors] " + at("a") + ": tensor \"h.0.weight\" is f32 [2, 3]; the program expects f32 [3, 2]");
  message_of(ErrorKind::kData, [&] { file.load_into("h.0.weight", Tensor::zeros({2, 3}, DType::f64)); });
}

TEST_F(Safetensors, RefusesToWriteWhatCannotBeRead) {
  const Tensor one = Tensor::zeros({1});
  const auto refused = [&](const Named& tensors, const std::map<std::string, std::string>& metadata = {}) {
    return message_of(ErrorKind::kValue, [&] { save_safetensors(at("a"), tensors, metadata); });
  };
  EXPECT_NE(refused({{"x", one}, {"y", one}, {"x", Tensor::zeros({2}, DType::u8)}}).find("two tensors are named \"x\""),
            std::string::npos);
  EXPECT_NE(refused({{"__metadata__", one}}).find("the format uses it"), std::string::npos);
  EXPECT_NE(refused({{"\xff", one}}).find("is not valid UTF-8"), std::string::npos);
  EXPECT_NE(refused({}, {{"k", "\xc0\x80"}}).find("is not valid UTF-8"), std::string::npos);
  EXPECT_NE(refused({{"x", Tensor()}}).find("is undefined"), std::string::npos);
  EXPECT_FALSE(fs::exists(at("a")));
  EXPECT_NE(message_of(ErrorKind::kIo, [&] { save_safetensors(at("none/a"), Named{{"x", one}}); }).find(at("none/a")),
            std::string::npos);
}

TEST_F(Safetensors, RefusesAHeaderAboveTheLimit) {
  const std::string large(static_cast<size_t>(kSafetensorsMaxHeader), 'x');
  EXPECT_NE(message_of(ErrorKind::kValue, [&] { save_safetensors(at("a"), Named{}, {{"k", large}}); })
                .find("the format allows 100,000,000"),
            std::string::npos);
}

TEST_F(Safetensors, ReadsAHeaderInAnyOrderWithSpacesBetweenItsTokens) {
  const std::string file = file_with(
      "{\n\t\"b\" : { \"data_offsets\" : [ 2 , 4 ] , \"shape\" : [ 2 ] , \"dtype\" : \"U8\" },\r\n"
      "\"\\u0061\":{\"shape\":[1],\"dtype\":\"BF16\",\"data_offsets\":[0,2]},\"e\":{\"dtype\":\"F64\",\"shape\":[0,9],"
      "\"data_offsets\":[2,2]},\"__metadata__\":{\"a\":\"x\"} }     ",
      4);
  const SafetensorsHeader header = parse_safetensors(as_bytes(file), "f");
  ASSERT_EQ(header.tensors.size(), 3u);
  EXPECT_EQ(header.tensors[0].name, "a");
  EXPECT_EQ(header.tensors[0].dtype, DType::bf16);
  EXPECT_EQ(header.tensors[1].name, "e");
  EXPECT_EQ(header.tensors[1].shape, (Shape{0, 9}));
  EXPECT_EQ(header.tensors[2].name, "b");
  EXPECT_EQ(header.metadata.at("a"), "x");
}

struct Malformed {
  const char* name;
  std::string file;
  std::string message;  ///< after "[load_safetensors] f: "; a part of it, from its beginning
};

std::vector<Malformed> malformed() {
  const auto entry = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "{\"x\":{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}";
  };
  const auto two = [](const std::string& a, const std::string& b) {
    return "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" + a +
           "},\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" + b + "}}";
  };
  const std::string good = entry("\"F32\"", "[1]", "[0,4]");
  const std::string must = "; it must have exactly dtype, shape and data_offsets";
  const std::string offsets_range = " in its data_offsets; they are integers from 0 to 9,223,372,036,854,775,807";
  const std::string shape_range = " in its shape; sizes are integers from 0 to 9,223,372,036,854,775,807";
  const std::string json = "the header is not valid JSON at its byte ";
  return {
      {"EmptyFile", "", "the file has 0 bytes; it must begin with 8 bytes"},
      {"SevenBytes", std::string(7, '\0'), "the file has 7 bytes; it must begin with 8 bytes"},
      {"NoHeader", std::string(8, '\0'), "the header begins with nothing; it must be a JSON object"},
      {"HeaderBeyondFile", file_with(good, 4, 1000),
       "the header ends at byte 1,008 but the file has 66: the file is truncated"},
      {"HeaderOneByteBeyondFile", file_with("{}", 0, 3), "the header ends at byte 11 but the file has 10"},
      {"HeaderAboveLimit", file_with(good, 4, 100'000'001),
       "its first 8 bytes say that the header has 100000001 bytes; at most 100,000,000 are allowed"},
      {"HeaderLengthAllOnes", file_with(good, 4, -2),
       "its first 8 bytes say that the header has 18446744073709551614 bytes"},
      {"LeadingSpace", file_with(" {}", 0),
       "the header begins with \" \"; it must be a JSON object and begin with \"{\""},
      {"LeadingByteOrderMark", file_with("\xef\xbb\xbf{}", 0), "the header begins with \"\\xef\""},
      {"AnArray", file_with("[]", 0), "the header begins with \"[\""},
      {"TrailingNewline", file_with("{}\n", 0),
       "the header ends with \"\\x0a\"; after the JSON object only spaces may follow"},
      {"TrailingNul", file_with(std::string("{}\0", 3), 0), "the header ends with \"\\x00\""},
      {"NulBeforeTheEnd", file_with(std::string("{}\0}", 4), 0), "the header ends with \"}\" but holds a NUL byte"},
      {"TwoObjects", file_with("{}{}", 0), json + "3 (\"syntax error while parsing value - unexpected '{'"},
      {"Unclosed", file_with("{\"__metadata__\":{}", 0), json},
      {"LengthCutsHeader", file_with(good, 4, static_cast<int64_t>(good.size()) - 1), json},
      {"TrailingComma", file_with("{\"__metadata__\":{},}", 0), json},
      {"Comment", file_with("{/*x*/}", 0), json},
      {"SingleQuotes", file_with("{'x':{}}", 0), json},
      {"BadUtf8Name", file_with("{\"\xff\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", 1),
       json + "3 (\"syntax error while parsing object key - invalid string: ill-formed UTF-8 byte"},
      {"OverlongUtf8", file_with("{\"__metadata__\":{\"k\":\"\xc0\x80\"}}", 0), json},
      {"LoneSurrogate", file_with("{\"__metadata__\":{\"k\":\"\\ud800\"}}", 0), json},
      {"ControlCharacterInName", file_with("{\"a\nb\":{}}", 0), json},
      {"DuplicateTensor", file_with("{\"x\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]},\"\\u0078\":{}}", 1),
       "the name \"x\" appears twice in the header"},
      {"DuplicateMetadata", file_with("{\"__metadata__\":{},\"__metadata__\":{}}", 0),
       "the name \"__metadata__\" appears twice in the header"},
      {"DuplicateMetadataKey", file_with("{\"__metadata__\":{\"k\":\"1\",\"k\":\"1\"}}", 0),
       "the key \"k\" appears twice in __metadata__"},
      {"DuplicateDtype",
       file_with("{\"x\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", 1),
       "tensor \"x\" has the key \"dtype\" twice"},
      {"MetadataNumber", file_with("{\"__metadata__\":{\"k\":1}}", 0),
       "__metadata__ maps \"k\" to 1; it may only map strings to strings"},
      {"MetadataNull", file_with("{\"__metadata__\":null}", 0),
       "__metadata__ is null; it must be an object of strings"},
      {"MetadataString", file_with("{\"__metadata__\":\"x\"}", 0),
       "__metadata__ is \"x\"; it must be an object of strings"},
      {"MetadataNested", file_with("{\"__metadata__\":{\"k\":{}}}", 0), "__metadata__ maps \"k\" to an object;"},
      {"MetadataArray", file_with("{\"__metadata__\":{\"k\":[]}}", 0), "__metadata__ maps \"k\" to an array;"},
      {"TensorNumber", file_with("{\"x\":1}", 0), "tensor \"x\" is 1; it must be an object"},
      {"TensorArray", file_with("{\"x\":[[[[[]]]]]}", 0), "tensor \"x\" is an array; it must be an object"},
      {"TensorEmpty", file_with("{\"x\":{}}", 0), "tensor \"x\" has no dtype" + must},
      {"NoDtype", file_with("{\"x\":{\"shape\":[],\"data_offsets\":[0,1]}}", 1), "tensor \"x\" has no dtype" + must},
      {"NoShape", file_with("{\"x\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1),
       "tensor \"x\" has no shape" + must},
      {"NoOffsets", file_with("{\"x\":{\"dtype\":\"U8\",\"shape\":[]}}", 1), "tensor \"x\" has no data_offsets" + must},
      {"ForeignKey", file_with("{\"x\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1],\"strides\":[]}}", 1),
       "tensor \"x\" has a key \"strides\"" + must},
      {"DtypeNumber", file_with(entry("1", "[]", "[0,1]"), 1), "tensor \"x\" has dtype = 1; it must be a string"},
      {"DtypeObject", file_with(entry("{}", "[]", "[0,1]"), 1),
       "tensor \"x\" has dtype = an object; it must be a string"},
      {"DtypeUnknown", file_with(entry("\"f32\"", "[1]", "[0,4]"), 4),
       "tensor \"x\" has dtype \"f32\", which the format does not have; supported are F64, F32, F16, BF16, I64"},
      {"DtypeU16", file_with(entry("\"U16\"", "[2]", "[0,4]"), 4),
       "tensor \"x\" has dtype \"U16\", which is not supported;"},
      {"DtypeI16", file_with(entry("\"I16\"", "[2]", "[0,4]"), 4),
       "tensor \"x\" has dtype \"I16\", which is not supported;"},
      {"DtypeU32", file_with(entry("\"U32\"", "[1]", "[0,4]"), 4),
       "tensor \"x\" has dtype \"U32\", which is not supported;"},
      {"DtypeU64", file_with(entry("\"U64\"", "[]", "[0,8]"), 8),
       "tensor \"x\" has dtype \"U64\", which is not supported;"},
      {"DtypeF8Variant", file_with(entry("\"F8_E4M3FNUZ\"", "[]", "[0,1]"), 1),
       "tensor \"x\" has dtype \"F8_E4M3FNUZ\", which is not supported;"},
      {"ShapeNumber", file_with(entry("\"U8\"", "1", "[0,1]"), 1),
       "tensor \"x\" has shape = 1; it must be an array of integers"},
      {"ShapeNegative", file_with(entry("\"U8\"", "[-1]", "[0,1]"), 1), "tensor \"x\" has -1" + shape_range},
      {"ShapeMinusZero", file_with(entry("\"U8\"", "[-0]", "[0,0]"), 0), "tensor \"x\" has 0" + shape_range},
      {"ShapeFloat", file_with(entry("\"U8\"", "[1.0]", "[0,1]"), 1), "tensor \"x\" has 1.0" + shape_range},
      {"ShapeExponent", file_with(entry("\"U8\"", "[1e0]", "[0,1]"), 1), "tensor \"x\" has 1e0" + shape_range},
      {"ShapeString", file_with(entry("\"U8\"", "[\"1\"]", "[0,1]"), 1), "tensor \"x\" has \"1\"" + shape_range},
      {"ShapeNull", file_with(entry("\"U8\"", "[null]", "[0,1]"), 1), "tensor \"x\" has null" + shape_range},
      {"ShapeTrue", file_with(entry("\"U8\"", "[true]", "[0,1]"), 1), "tensor \"x\" has true" + shape_range},
      {"ShapeNested", file_with(entry("\"U8\"", "[[1]]", "[0,1]"), 1), "tensor \"x\" has an array" + shape_range},
      {"ShapeAboveInt64", file_with(entry("\"U8\"", "[9223372036854775808]", "[0,1]"), 1),
       "tensor \"x\" has 9223372036854775808" + shape_range},
      {"ShapeAboveUint64", file_with(entry("\"U8\"", "[18446744073709551617]", "[0,1]"), 1),
       "tensor \"x\" has 18446744073709551617" + shape_range},
      {"ShapeHuge", file_with(entry("\"U8\"", "[1e999]", "[0,1]"), 1), json},
      {"ShapeOverflow", file_with(entry("\"U8\"", "[4294967296,4294967296]", "[0,0]"), 0),
       "tensor \"x\" is u8 [4294967296, 4294967296], which has more bytes than 64 bits can count"},
      {"ShapeOverflowsInBytesOnly", file_with(entry("\"F64\"", "[1152921504606846976]", "[0,0]"), 0),
       "tensor \"x\" is f64 [1152921504606846976], which has more bytes"},
      {"ShapeOverflowBesideZero", file_with(entry("\"U8\"", "[0,4294967296,4294967296]", "[0,0]"), 0),
       "tensor \"x\" is u8 [0, 4294967296, 4294967296], which has more bytes"},
      {"RankSeven", file_with(entry("\"U8\"", "[1,1,1,1,1,1,1]", "[0,1]"), 1),
       "tensor \"x\" has more than 6 dimensions"},
      {"OffsetsObject", file_with(entry("\"U8\"", "[]", "{}"), 1), "tensor \"x\" has data_offsets = an object;"},
      {"OffsetsEmpty", file_with(entry("\"U8\"", "[]", "[]"), 1),
       "tensor \"x\" data_offsets has 0 numbers; it must have 2"},
      {"OffsetsOne", file_with(entry("\"U8\"", "[]", "[1]"), 1),
       "tensor \"x\" data_offsets has 1 numbers; it must have 2"},
      {"OffsetsThree", file_with(entry("\"U8\"", "[]", "[0,1,1]"), 1),
       "tensor \"x\" data_offsets has more than 2 numbers"},
      {"OffsetsNegative", file_with(entry("\"U8\"", "[]", "[-1,0]"), 1), "tensor \"x\" has -1" + offsets_range},
      {"OffsetsFloat", file_with(entry("\"U8\"", "[]", "[0,1.5]"), 1), "tensor \"x\" has 1.5" + offsets_range},
      {"OffsetsAboveInt64", file_with(entry("\"U8\"", "[]", "[9223372036854775807,9223372036854775808]"), 1),
       "tensor \"x\" has 9223372036854775808" + offsets_range},
      {"OffsetsBackwards", file_with(entry("\"U8\"", "[0]", "[4,0]"), 4),
       "tensor \"x\" begins at byte 4 of the data and ends at 0; the end must not be before the beginning"},
      {"TooFewBytes", file_with(entry("\"F32\"", "[2,3]", "[0,20]"), 20),
       "tensor \"x\" has 20 bytes (0 to 20), but f32 [2, 3] needs 24"},
      {"TooManyBytes", file_with(entry("\"F32\"", "[]", "[0,8]"), 8),
       "tensor \"x\" has 8 bytes (0 to 8), but f32 [] needs 4"},
      {"BytesForAnEmptyTensor", file_with(entry("\"F32\"", "[0]", "[0,4]"), 4),
       "tensor \"x\" has 4 bytes (0 to 4), but f32 [0] needs 0"},
      {"DataMissing", file_with(good, 3),
       "tensor \"x\" ends at byte 66 but the file has 65: the file is truncated. Hint: "},
      {"DataFarAway", file_with(entry("\"U8\"", "[1]", "[9223372036854775806,9223372036854775807]"), 1),
       "tensor \"x\" begins at byte 9,223,372,036,854,775,806 of the data, but the data begins at 0: no tensor may "
       "leave a gap"},
      {"DataClaimedHuge", file_with(entry("\"U8\"", "[9223372036854775807]", "[0,9223372036854775807]"), 1),
       "tensor \"x\" ends at byte "},
      {"BytesAfterTheLastTensor", file_with(good, 5),
       "the tensors end at byte 66 but the file has 67: no bytes may follow"},
      {"BytesWithoutTensors", file_with("{}", 1), "the tensors end at byte 10 but the file has 11"},
      {"GapAtTheStart", file_with(entry("\"U8\"", "[1]", "[1,2]"), 2),
       "tensor \"x\" begins at byte 1 of the data, but the data begins at 0: no tensor may leave a gap"},
      {"Gap", file_with(two("[0,4]", "[5,9]"), 9),
       "tensor \"b\" begins at byte 5 of the data, but tensor \"a\" before it ends at 4: no tensor may leave a gap"},
      {"Overlap", file_with(two("[0,4]", "[3,7]"), 7),
       "tensor \"b\" begins at byte 3 of the data, but tensor \"a\" before it ends at 4: they overlap"},
      {"SameBytesTwice", file_with(two("[0,4]", "[0,4]"), 4),
       "tensor \"b\" begins at byte 0 of the data, but tensor \"a\" before it ends at 4: they overlap"},
      {"EmptyTensorInsideAnother",
       file_with("{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
                 "\"e\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[2,2]}}",
                 4),
       "tensor \"e\" begins at byte 2 of the data, but tensor \"a\" before it ends at 4: they overlap"},
  };
}

TEST_F(Safetensors, RefusesEveryMalformedFileWithItsReason) {
  const std::vector<Malformed> cases = malformed();
  EXPECT_GE(cases.size(), 40u);
  for (const Malformed& each : cases) {
    SCOPED_TRACE(each.name);
    const std::string message = message_of(ErrorKind::kData, [&] { parse_safetensors(as_bytes(each.file), "f"); });
    const std::string expected = "[load_safetensors] f: " + each.message;
    EXPECT_EQ(message.substr(0, expected.size()), expected) << "whole message: " << message;
  }
}

TEST_F(Safetensors, RefusesDeepNestingWithoutRecursion) {
  const std::string deep = "{\"__metadata__\":" + std::string(1'000'000, '[');
  message_of(ErrorKind::kData, [&] { parse_safetensors(as_bytes(file_with(deep + "}", 0)), "f"); });
}

TEST_F(Safetensors, RefusesBooleansOtherThan0And1) {
  std::string content = file_with(R"({"mask":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}})", 3);
  content[content.size() - 2] = 2;
  const SafetensorsFile file(as_bytes(content), "f");
  const std::string expected =
      "[load_safetensors] f: tensor \"mask\" is BOOL but its element 1 is the byte 2; only 0 and 1 are allowed";
  EXPECT_EQ(message_of(ErrorKind::kData, [&] { file.load("mask"); }), expected);
  EXPECT_EQ(message_of(ErrorKind::kData, [&] { file.load_into("mask", Tensor::zeros({3}, DType::boolean)); }),
            expected);
  EXPECT_EQ(message_of(ErrorKind::kData, [&] { file.check_values(); }), expected);
}

TEST_F(Safetensors, RefusesAFileCutAtAnyByte) {
  save_safetensors(
      at("a"),
      Named{{"x", Tensor::arange(5, DType::i32)}, {"e", Tensor::zeros({0})}, {"b", Tensor::zeros({3}, DType::u8)}});
  const std::string content = read_file(at("a"));
  EXPECT_EQ(parse_safetensors(as_bytes(content), "f").tensors.size(), 3u);
  for (size_t size = 0; size < content.size(); ++size) {
    EXPECT_THROW(parse_safetensors(as_bytes(content).first(size), "f"), Error) << size;
  }
  EXPECT_THROW(parse_safetensors(as_bytes(content + " "), "f"), Error);
}

}  // namespace
}  // namespace weft
