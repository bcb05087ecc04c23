package kvahead

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const testVocabulary = 320

var testPrompt = []uint32{1, 42, 7, 99, 300, 5, 5, 18}

func testModelPath(t testing.TB) string {
	data := os.Getenv("KVAHEAD_TEST_DATA")
	if data == "" {
		data = filepath.Join("..", "..", "tests", "data")
	}
	return filepath.Join(data, "golden", "smollm2")
}

func must[T any](value T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, err error, code ErrorCode, text string) {
	t.Helper()
	if !errors.Is(err, code) || !strings.Contains(err.Error(), text) {
		t.Fatalf("got error %v, want %v with %q", err, code, text)
	}
}

func testModel(t testing.TB) *Model {
	t.Helper()
	model := must(Load(testModelPath(t), &ModelOptions{DType: F32, Threads: 2}))(t)
	t.Cleanup(func() { model.Close() })
	return model
}

func testSession(t testing.TB, model *Model) *Session {
	t.Helper()
	session := must(model.NewSession(nil))(t)
	t.Cleanup(func() { session.Close() })
	return session
}

var background = context.Background()

// greedy prefills and then decodes the likeliest token count times.
func greedy(t testing.TB, session *Session, prompt []uint32, count int) []uint32 {
	t.Helper()
	check(t, session.Prefill(background, prompt, nil))
	var tokens []uint32
	for i := 0; i < count; i++ {
		token := must(session.Sample(nil))(t)
		check(t, session.Decode(background, token, nil))
		tokens = append(tokens, token)
	}
	return tokens
}

func TestInfo(t *testing.T) {
	model := testModel(t)
	info := must(model.Info())(t)
	if info.Architecture != "llama" || info.Layers != 3 || info.VocabularySize != testVocabulary || info.ContextLength != 512 ||
		info.DType != F32 || !info.HasTokenizer || !info.HasChatTemplate || info.Backend == "" {
		t.Errorf("info %+v", info)
	}
	if info.EOSToken == nil || *info.EOSToken != 2 {
		t.Errorf("EOS token %v", info.EOSToken)
	}
	one := must(model.Estimate(nil, 1))(t)
	two := must(model.Estimate(nil, 2))(t)
	if one.KVDeviceBytes == 0 || two.KVDeviceBytes != 2*one.KVDeviceBytes || one.WeightBytes != info.WeightBytes {
		t.Errorf("estimates %+v, %+v", one, two)
	}
	if Version() == "" {
		t.Error("no version")
	}
}

func TestText(t *testing.T) {
	model := testModel(t)
	for _, text := range []string{"Once upon a time", "naïve café 😀 日本語", ""} {
		tokens := must(model.Tokenize(text, 0))(t)
		if got := must(model.Detokenize(tokens, 0))(t); got != text {
			t.Errorf("%q came back as %q", text, got)
		}
		detokenizer := must(model.NewDetokenizer(SkipSpecial))(t)
		var joined string
		for _, token := range tokens {
			joined += must(detokenizer.Push(token))(t)
		}
		joined += must(detokenizer.Finish())(t)
		if joined != text {
			t.Errorf("%q in pieces is %q", text, joined)
		}
		check(t, detokenizer.Close())
		check(t, detokenizer.Close())
		_, err := detokenizer.Push(1)
		wantError(t, err, ErrInvalidArgument, "closed")
	}
	if got := must(model.Tokenize("<|im_end|>", ParseSpecial))(t); !reflect.DeepEqual(got, []uint32{2}) {
		t.Errorf("special token %v", got)
	}
	if got := must(model.StopTokens())(t); len(got) == 0 {
		t.Error("no stop tokens")
	}
	text := must(model.ApplyChatTemplate([]Message{{"system", "Be brief."}, {"user", "Hi"}}, true))(t)
	want := "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
	if text != want {
		t.Errorf("template %q", text)
	}
}

func TestErrors(t *testing.T) {
	_, err := Load("/nowhere/model", nil)
	wantError(t, err, ErrNotFound, "/nowhere/model")
	var e *Error
	if !errors.As(err, &e) || e.Code != ErrNotFound || errors.Is(err, ErrIO) {
		t.Errorf("error %#v", err)
	}
	_, err = Load("a\x00b", nil)
	wantError(t, err, ErrInvalidArgument, "NUL")
	_, err = Random("llama-9", 1, nil)
	wantError(t, err, ErrInvalidArgument, "smollm2-135m")

	model := testModel(t)
	_, err = model.NewSession(&SessionOptions{Capacity: 513})
	wantError(t, err, ErrInvalidArgument, "513")
	_, err = model.ApplyChatTemplate([]Message{{"user", "a\x00b"}}, true)
	wantError(t, err, ErrInvalidArgument, "NUL")
	session := must(model.NewSession(&SessionOptions{Capacity: 4}))(t)
	defer session.Close()
	wantError(t, session.Prefill(background, testPrompt, nil), ErrCapacity, "")
	wantError(t, session.Prefill(background, []uint32{320}, nil), ErrInvalidArgument, "320")
	wantError(t, session.Prefill(background, nil, nil), ErrInvalidArgument, "")
	wantError(t, session.Prefill(background, []uint32{1}, make([]float32, 3)), ErrInvalidArgument, "logits")
	wantError(t, session.Truncate(-1), ErrInvalidArgument, "-1")
	_, err = session.Sample(nil)
	wantError(t, err, ErrInvalidArgument, "")
}

func TestClosed(t *testing.T) {
	model := testModel(t)
	session := testSession(t, model)
	check(t, model.Close())
	check(t, model.Close())
	_, err := model.Info()
	wantError(t, err, ErrInvalidArgument, "closed")
	check(t, session.Prefill(background, testPrompt, nil)) // it keeps the model alive
	check(t, session.Close())
	check(t, session.Close())
	wantError(t, session.Decode(background, 1, nil), ErrInvalidArgument, "closed")
	if session.Len() != 0 || session.Capacity() != 0 {
		t.Error("a closed session has a length")
	}
	session.Cancel()
	session.ClearCancel()
}

func TestPrefillDecodeScore(t *testing.T) {
	model := testModel(t)
	whole, stepped := make([]float32, testVocabulary), make([]float32, testVocabulary)
	one, two, three := testSession(t, model), testSession(t, model), testSession(t, model)
	check(t, one.Prefill(background, testPrompt, whole))
	for _, token := range testPrompt {
		check(t, two.Decode(background, token, stepped))
	}
	for i := range whole {
		if math.Abs(float64(whole[i]-stepped[i])) > 1e-4 {
			t.Fatalf("logit %d: %v in one, %v in steps", i, whole[i], stepped[i])
		}
	}
	if got := must(two.Tokens())(t); !reflect.DeepEqual(got, testPrompt) {
		t.Errorf("tokens %v", got)
	}
	scores := must(three.Score(background, testPrompt))(t)
	if len(scores) != len(testPrompt) || !math.IsNaN(float64(scores[0])) || !(scores[1] < 0) {
		t.Errorf("scores %v", scores)
	}
	check(t, one.Truncate(3))
	if one.Len() != 3 || one.Capacity() != 512 {
		t.Errorf("length %d, capacity %d", one.Len(), one.Capacity())
	}
	statistics := must(two.Statistics())(t)
	if statistics.DecodeTokens != uint64(len(testPrompt)) || statistics.KVDeviceBytes == 0 {
		t.Errorf("statistics %+v", statistics)
	}
	check(t, two.ResetStatistics())
	if must(two.Statistics())(t).DecodeTokens != 0 {
		t.Error("statistics not reset")
	}
}

func TestBatch(t *testing.T) {
	model := testModel(t)
	var sessions []*Session
	var tokens []uint32
	var want []float32
	for i := 1; i <= 3; i++ {
		session := testSession(t, model)
		row := make([]float32, testVocabulary)
		check(t, session.Prefill(background, testPrompt[:i], nil))
		check(t, session.Decode(background, uint32(10+i), row))
		check(t, session.Truncate(i))
		sessions, tokens, want = append(sessions, session), append(tokens, uint32(10+i)), append(want, row...)
	}
	got := make([]float32, len(want))
	check(t, DecodeBatch(background, sessions, tokens, got))
	if !reflect.DeepEqual(got, want) {
		t.Error("a batch gives other logits than single steps")
	}
	wantError(t, DecodeBatch(background, sessions, tokens[:2], nil), ErrInvalidArgument, "2 tokens for 3 sessions")
	wantError(t, DecodeBatch(background, []*Session{sessions[0], sessions[0]}, tokens[:2], nil), ErrInvalidArgument, "twice")
	wantError(t, DecodeBatch(background, []*Session{nil}, tokens[:1], nil), ErrInvalidArgument, "nil")
	wantError(t, DecodeBatch(background, nil, nil, nil), ErrInvalidArgument, "")
}

func TestSample(t *testing.T) {
	session := testSession(t, testModel(t))
	check(t, session.Prefill(background, testPrompt, nil))
	varied := false
	var first uint32
	for seed := uint64(0); seed < 32; seed++ {
		options := SamplingOptions{Temperature: 2, Seed: seed}
		token := must(session.Sample(&options))(t)
		if again := must(session.Sample(&options))(t); again != token {
			t.Errorf("seed %d gave %d and %d", seed, token, again)
		}
		if seed == 0 {
			first = token
		}
		varied = varied || token != first
	}
	if !varied {
		t.Error("32 seeds gave the same token")
	}
	biased := SamplingOptions{LogitBias: map[uint32]float32{123: 1000, 7: float32(math.Inf(-1))}}
	if token := must(session.Sample(&biased))(t); token != 123 {
		t.Errorf("bias gave %d", token)
	}
	_, err := session.Sample(&SamplingOptions{Temperature: -1})
	wantError(t, err, ErrInvalidArgument, "temperature")
}

func TestLoadCallbacks(t *testing.T) {
	last, calls := float32(0), 0
	lines := make(chan string, 100)
	model, err := Load(testModelPath(t), &ModelOptions{
		Progress: func(fraction float32) error { last, calls = fraction, calls+1; return nil },
		Log:      func(level LogLevel, message string) { lines <- message; panic("is dropped") },
		LogLevel: LogDebug,
	})
	check(t, err)
	defer model.Close()
	if last != 1 || calls == 0 || len(lines) == 0 {
		t.Errorf("%d calls up to %v, %d lines", calls, last, len(lines))
	}
	own := errors.New("own")
	if _, err := Load(testModelPath(t), &ModelOptions{Progress: func(float32) error { return own }}); err != own {
		t.Errorf("got %v", err)
	}
	defer func() {
		if p := recover(); p == nil || !strings.Contains(p.(string), "oh no") {
			t.Errorf("recovered %v", p)
		}
	}()
	_, _ = Load(testModelPath(t), &ModelOptions{Progress: func(float32) error { panic("oh no") }})
	t.Error("the panic did not come through")
}
