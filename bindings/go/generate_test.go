package kvahead

import (
	"context"
	"errors"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// endless generates until the context is full.
var endless = GenerateOptions{IgnoreModelStopTokens: true}

func TestGenerate(t *testing.T) {
	model := testModel(t)
	want := greedy(t, testSession(t, model), testPrompt, 12)
	session := testSession(t, model)
	options := GenerateOptions{MaxTokens: 12, IgnoreModelStopTokens: true}
	var tokens []uint32
	var text strings.Builder
	generated, err := session.Generate(background, testPrompt, &options, func(piece Piece) error {
		if len(tokens) < 12 {
			tokens = append(tokens, piece.Token)
		}
		text.WriteString(piece.Text)
		return nil
	})
	check(t, err)
	if generated.Finish != FinishLength || generated.Tokens != 12 || !reflect.DeepEqual(tokens, want) {
		t.Errorf("%+v with %v, want %v", generated, tokens, want)
	}
	if whole := must(model.Detokenize(want, SkipSpecial))(t); text.String() != whole {
		t.Errorf("text %q, want %q", &text, whole)
	}
	if session.Len() != len(testPrompt)+12 {
		t.Errorf("length %d", session.Len())
	}
	if again := must(session.Generate(background, nil, &options, nil))(t); again.Tokens != 12 {
		t.Errorf("went on with %+v", again)
	}
}

func TestStop(t *testing.T) {
	model := testModel(t)
	generate := func(options GenerateOptions, callback func(Piece) error) (Generated, string) {
		var text strings.Builder
		generated, err := testSession(t, model).Generate(background, testPrompt, &options, func(piece Piece) error {
			text.WriteString(piece.Text)
			if callback != nil {
				return callback(piece)
			}
			return nil
		})
		check(t, err)
		return generated, text.String()
	}
	options := GenerateOptions{MaxTokens: 40, IgnoreModelStopTokens: true}
	_, whole := generate(options, nil)

	options.StopStrings = []string{"never to be seen", whole[6:9]}
	generated, text := generate(options, nil)
	if generated.Finish != FinishStopString || text != whole[:strings.Index(whole, whole[6:9])] {
		t.Errorf("%v with %q of %q", generated.Finish, text, whole)
	}

	first := greedy(t, testSession(t, model), testPrompt, 1)[0]
	options.StopStrings, options.StopTokens = nil, []uint32{first}
	generated, text = generate(options, nil)
	if generated.Finish != FinishStopToken || *generated.LastToken != first || generated.Tokens != 0 || text != "" {
		t.Errorf("%+v with %q", generated, text)
	}

	generated, _ = generate(endless, func(Piece) error { return ErrStop })
	if generated.Finish != FinishCallback || generated.Tokens != 1 {
		t.Errorf("%+v", generated)
	}
	generated, _ = generate(endless, nil)
	if generated.Finish != FinishContext {
		t.Errorf("%+v", generated)
	}
	_, err := testSession(t, model).Generate(background, testPrompt, &GenerateOptions{StopStrings: []string{"a\x00"}}, nil)
	wantError(t, err, ErrInvalidArgument, "NUL")
}

func TestCallbackErrorAndPanic(t *testing.T) {
	session := testSession(t, testModel(t))
	own := errors.New("own")
	_, err := session.Generate(background, testPrompt, &endless, func(Piece) error { return own })
	if err != own {
		t.Errorf("got %v", err)
	}
	func() {
		defer func() {
			if p := recover(); p == nil || !strings.Contains(p.(string), "oh no") {
				t.Errorf("recovered %v", p)
			}
		}()
		_, _ = session.Generate(background, nil, &endless, func(Piece) error { panic("oh no") })
		t.Error("the panic did not come through")
	}()
	if session.Len() != len(testPrompt)+2 {
		t.Errorf("length %d", session.Len())
	}
	check(t, session.Decode(background, 1, nil)) // and it is usable
}

func TestContextCancels(t *testing.T) {
	session := testSession(t, testModel(t))
	ctx, cancel := context.WithCancel(background)
	calls := 0
	_, err := session.Generate(ctx, testPrompt, &endless, func(Piece) error {
		if calls++; calls == 3 {
			cancel()
			time.Sleep(50 * time.Millisecond) // the watcher cancels meanwhile
		}
		return nil
	})
	wantError(t, err, ErrCancelled, "context canceled")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v is not the context's error", err)
	}
	if session.Len() != len(testPrompt)+calls {
		t.Errorf("length %d after %d tokens", session.Len(), calls)
	}
	err = session.Decode(ctx, 1, nil)
	wantError(t, err, ErrCancelled, "")
	check(t, session.Decode(background, 1, nil)) // nothing is left over for the next call
}

func TestContextThatEndsLateLeavesNothingBehind(t *testing.T) {
	session := testSession(t, testModel(t))
	check(t, session.Prefill(background, testPrompt, nil))
	for i := 0; i < 200; i++ {
		ctx, cancel := context.WithCancel(background)
		go cancel()
		if err := session.Decode(ctx, 1, nil); err != nil {
			wantError(t, err, ErrCancelled, "")
		}
		check(t, session.Decode(background, 2, nil))
		check(t, session.Truncate(len(testPrompt)))
		cancel()
	}
}

func TestDeadline(t *testing.T) {
	session := testSession(t, testModel(t))
	ctx, cancel := context.WithTimeout(background, 20*time.Millisecond)
	defer cancel()
	_, err := session.Generate(ctx, testPrompt, &endless, func(Piece) error {
		time.Sleep(time.Millisecond)
		return nil
	})
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrCancelled) {
		t.Errorf("got %v", err)
	}
}

func TestCancelIsConsumedOnce(t *testing.T) {
	session := testSession(t, testModel(t))
	session.Cancel()
	wantError(t, session.Prefill(background, testPrompt, nil), ErrCancelled, "")
	check(t, session.Prefill(background, testPrompt, nil))
	session.Cancel()
	session.ClearCancel()
	check(t, session.Decode(background, 1, nil))
}

func TestBusy(t *testing.T) {
	session := testSession(t, testModel(t))
	_, err := session.Generate(background, testPrompt, &endless, func(Piece) error {
		wantError(t, session.Decode(background, 1, nil), ErrBusy, "")
		cancelled, cancel := context.WithCancel(background)
		cancel()
		wantError(t, session.Decode(cancelled, 1, nil), ErrBusy, "") // and does not cancel the call in progress
		wantError(t, DecodeBatch(background, []*Session{session}, []uint32{1}, nil), ErrBusy, "")
		if session.Len() == 0 {
			t.Error("no length while busy")
		}
		return ErrStop
	})
	check(t, err)
}

func TestCloseEndsACall(t *testing.T) {
	session := testSession(t, testModel(t))
	started, result := make(chan struct{}), make(chan error)
	go func() {
		var once sync.Once
		_, err := session.Generate(background, testPrompt, &endless, func(Piece) error {
			once.Do(func() { close(started) })
			time.Sleep(time.Millisecond)
			return nil
		})
		result <- err
	}()
	<-started
	check(t, session.Close())
	wantError(t, <-result, ErrCancelled, "")
}

// TestManyGoroutines runs sessions side by side on one model, with the garbage collector at work. All get the same text.
func TestManyGoroutines(t *testing.T) {
	model := testModel(t)
	want := greedy(t, testSession(t, model), testPrompt, 10)
	stop := make(chan struct{})
	var collector, workers sync.WaitGroup
	collector.Add(1)
	go func() {
		defer collector.Done()
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
				time.Sleep(time.Millisecond)
			}
		}
	}()
	for worker := 0; worker < 16; worker++ {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for round := 0; round < 4; round++ {
				session, err := model.NewSession(nil)
				if err != nil {
					t.Error(err)
					return
				}
				ctx, cancel := context.WithCancel(background)
				var tokens []uint32
				options := GenerateOptions{MaxTokens: 10, IgnoreModelStopTokens: true}
				_, err = session.Generate(ctx, testPrompt, &options, func(piece Piece) error {
					if len(tokens) < 10 {
						tokens = append(tokens, piece.Token)
					}
					return nil
				})
				cancel()
				if err != nil || !reflect.DeepEqual(tokens, want) {
					t.Errorf("%v, error %v", tokens, err)
				}
				if round%2 == 0 { // the others are left to their finalizers
					session.Close()
				}
			}
		}()
	}
	workers.Wait()
	close(stop)
	collector.Wait()
}

// TestFinalizers forgets everything, while calls go on, and sees that the collector frees it.
func TestFinalizers(t *testing.T) {
	freed := make(chan struct{})
	func() {
		sentinel := &struct{ session *Session }{}
		runtime.SetFinalizer(sentinel, func(any) { close(freed) })
		model := must(Load(testModelPath(t), &ModelOptions{Log: func(LogLevel, string) { _ = sentinel }}))(t)
		session := must(model.NewSession(nil))(t)
		detokenizer := must(model.NewDetokenizer(0))(t)
		check(t, session.Prefill(background, testPrompt, nil))
		must(detokenizer.Push(1))(t)
	}()
	// The log function goes when the library has freed the model, session and detokenizer that refer to it.
	deadline := time.After(20 * time.Second)
	for {
		runtime.GC()
		select {
		case <-freed:
			return
		case <-deadline:
			t.Fatal("the model was not freed")
		case <-time.After(10 * time.Millisecond):
		}
	}
}
