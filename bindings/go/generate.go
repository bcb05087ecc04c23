package kvahead

// #include <kvahead.h>
import "C"

import (
	"context"
	"errors"
)

// Piece is one token of a generation, with the text that has become certain by it: whole characters, maybe none. What was
// held back at the end comes in one more piece, with the last token again.
type Piece struct {
	Token uint32
	Text  string
}

// Finish is why a generation ended.
type Finish int32

// The reasons.
const (
	FinishStopToken  Finish = C.KVA_FINISH_STOP_TOKEN  // the model ended the text
	FinishStopString Finish = C.KVA_FINISH_STOP_STRING // a stop string appeared
	FinishLength     Finish = C.KVA_FINISH_LENGTH      // MaxTokens were emitted
	FinishContext    Finish = C.KVA_FINISH_CONTEXT     // the session is full
	FinishCallback   Finish = C.KVA_FINISH_CALLBACK    // the callback returned ErrStop
)

func (f Finish) String() string {
	switch f {
	case FinishStopToken:
		return "stop token"
	case FinishStopString:
		return "stop string"
	case FinishLength:
		return "length"
	case FinishContext:
		return "context full"
	case FinishCallback:
		return "callback"
	}
	return "unknown"
}

// Generated is what came of a generation.
type Generated struct {
	Finish    Finish
	Tokens    int     // emitted
	LastToken *uint32 // the last one sampled: the stop token, where one ended the text; nil: none
}

// ErrStop, returned by a callback of Generate, ends the generation, which is no error.
var ErrStop = errors.New("kvahead: stop the generation")

// Generate appends the prompt (empty: goes on from where the session is), then samples and appends tokens until the text
// ends. Each token goes to callback, which may be nil, on the calling goroutine; an error of the callback other than
// [ErrStop] ends the generation and is returned. The callback must not use the session, except for Cancel, Len and
// Capacity.
//
// After an error before the first token the session is as it was; after a later one, a done ctx for instance, it holds the
// prompt and every token that the callback has seen, and can go on from there.
func (s *Session) Generate(ctx context.Context, prompt []uint32, options *GenerateOptions, callback func(Piece) error) (Generated, error) {
	var a arena
	defer a.free()
	c, err := a.generate(options)
	if err != nil {
		return Generated{}, err
	}
	text := textCallback{call: callback}
	result := C.kva_generate_result{struct_size: C.sizeof_kva_generate_result}
	err = s.useContext(ctx, func() *C.kva_error {
		if callback != nil {
			setText(c, &text) // here, where it is certain that the library is called and frees it
		}
		return C.kva_session_generate(s.handle, tokenPointer(prompt), count(prompt), c, &result)
	})
	if errors.Is(text.err, ErrStop) {
		text.err = nil
	}
	if err := text.finish(err); err != nil {
		return Generated{}, err
	}
	return Generated{
		Finish:    Finish(result.finish_reason),
		Tokens:    int(result.tokens),
		LastToken: optionalToken(result.last_token),
	}, nil
}
