// Package kvahead runs LLM decode with the KV cache of running sequences in host memory or on disk: Go bindings of the
// kvahead C library.
//
// A [Model] is a loaded checkpoint; a [Session] is one sequence of tokens with its KV:
//
//	model, err := kvahead.Load("SmolLM2-135M-Instruct.gguf", nil)
//	if err != nil { ... }
//	defer model.Close()
//	session, err := model.NewSession(nil)
//	if err != nil { ... }
//	defer session.Close()
//	prompt, err := model.Tokenize("The capital of France is", kvahead.AddSpecial)
//	if err != nil { ... }
//	_, err = session.Generate(ctx, prompt, &kvahead.GenerateOptions{MaxTokens: 20}, func(piece kvahead.Piece) error {
//		fmt.Print(piece.Text)
//		return nil
//	})
//
// # Options
//
// Options are structs whose zero value, like a nil pointer to them, means the library's defaults; [InfinigenOptions] alone
// must come from [NewInfinigenOptions].
//
// # Errors
//
// Errors of the library are of type *[Error], with a code and a message. The codes are errors themselves, to compare with:
//
//	if errors.Is(err, kvahead.ErrCapacity) { ... }
//
// # Cancellation
//
// A call that takes a [context.Context] stops within one layer of the model when that is done, and its error then is both
// [ErrCancelled] and the context's own. The session stays usable.
//
// # Goroutines
//
// A Model may be used from many goroutines. A Session serves one call at a time: others get [ErrBusy]. Close waits for the
// calls in progress; Session.Close cancels them first. Sessions and detokenizers keep their model's memory alive, so the
// order of closing does not matter. A finalizer closes what was forgotten, whenever the garbage collector finds it: do not
// rely on it, as KV memory is large and the collector does not see it.
//
// # Building
//
// cgo finds the library by pkg-config (kvahead.pc, installed by bindings/cpp). For an install outside the system's folders:
//
//	export PKG_CONFIG_PATH=$PREFIX/lib/pkgconfig CGO_LDFLAGS=-Wl,-rpath,$PREFIX/lib
package kvahead
