package kvahead

// #include <kvahead.h>
import "C"

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sort"
	"sync"
	"unsafe"
)

// Session is one sequence of tokens and its KV. It serves one call at a time: others get [ErrBusy], except Cancel, Len,
// Capacity and Close.
type Session struct {
	busy   sync.Mutex     // held by the call in progress; calls try it and never wait
	state  sync.RWMutex   // guards handle against Close
	handle *C.kva_session // nil when closed
	vocab  int
}

// NewSession creates an empty session. Options may be nil. KV memory is taken as the session grows.
func (m *Model) NewSession(options *SessionOptions) (*Session, error) {
	var a arena
	defer a.free()
	c, err := a.session(options)
	if err != nil {
		return nil, err
	}
	s := &Session{vocab: m.vocab}
	err = m.use(func(handle *C.kva_model) error { return take(C.kva_session_create(handle, c, &s.handle)) })
	if err != nil {
		return nil, err
	}
	runtime.SetFinalizer(s, (*Session).Close)
	return s, nil
}

// Close cancels the call in progress, waits for its end, and frees the session. Later calls fail with
// [ErrInvalidArgument]; a later Close does nothing. Do not call it from a callback of the session's own call.
func (s *Session) Close() error {
	s.Cancel()
	s.busy.Lock()
	defer s.busy.Unlock()
	s.state.Lock()
	defer s.state.Unlock()
	C.kva_session_free(s.handle)
	s.handle = nil
	runtime.SetFinalizer(s, nil)
	return nil
}

// acquire makes the session this call's own until release.
func (s *Session) acquire() error {
	if !s.busy.TryLock() {
		return &Error{Code: ErrBusy, Message: "the session is in use by another call"}
	}
	if s.handle == nil { // written under busy only
		s.busy.Unlock()
		return errClosed("session")
	}
	return nil
}

func (s *Session) release() { s.busy.Unlock() }

// use runs a short call.
func (s *Session) use(call func() *C.kva_error) error {
	if err := s.acquire(); err != nil {
		return err
	}
	defer s.release()
	return take(call())
}

// useContext runs a long call, which ctx can cancel.
func (s *Session) useContext(ctx context.Context, call func() *C.kva_error) error {
	if err := s.acquire(); err != nil {
		return err
	}
	defer s.release()
	return cancellable(ctx, []*Session{s}, call)
}

// cancellable runs call, and cancels the sessions when ctx is done. The sessions are acquired.
func cancellable(ctx context.Context, sessions []*Session, call func() *C.kva_error) error {
	if err := ctx.Err(); err != nil {
		return cancelled(err)
	}
	if ctx.Done() == nil {
		return take(call())
	}
	finished := make(chan struct{})
	watched := make(chan bool)
	go func() {
		select {
		case <-ctx.Done():
			for _, s := range sessions {
				C.kva_session_cancel(s.handle)
			}
			watched <- true
		case <-finished:
			watched <- false
		}
	}()
	err := take(call())
	close(finished)
	if !<-watched {
		return err
	}
	// A request that came after the call's end, or that another session of the batch consumed, must not hit the next call.
	for _, s := range sessions {
		C.kva_session_clear_cancel(s.handle)
	}
	if errors.Is(err, ErrCancelled) {
		return cancelled(ctx.Err())
	}
	return err
}

func cancelled(cause error) error {
	return &Error{Code: ErrCancelled, Message: "cancelled: " + cause.Error(), cause: cause}
}

// Cancel stops the call in progress, or else the next one, within one layer; it returns [ErrCancelled].
func (s *Session) Cancel() {
	s.state.RLock()
	defer s.state.RUnlock()
	C.kva_session_cancel(s.handle) // ignores NULL
}

// ClearCancel takes back a Cancel that no call has consumed.
func (s *Session) ClearCancel() {
	s.state.RLock()
	defer s.state.RUnlock()
	C.kva_session_clear_cancel(s.handle)
}

// Len is the number of tokens held; 0 when closed. At any time.
func (s *Session) Len() int {
	s.state.RLock()
	defer s.state.RUnlock()
	return int(C.kva_session_length(s.handle))
}

// Capacity is the most tokens that may be held; 0 when closed. At any time.
func (s *Session) Capacity() int {
	s.state.RLock()
	defer s.state.RUnlock()
	return int(C.kva_session_capacity(s.handle))
}

// Tokens are the tokens held, in order.
func (s *Session) Tokens() ([]uint32, error) {
	if err := s.acquire(); err != nil {
		return nil, err
	}
	defer s.release()
	return readTokens(func(tokens *C.uint32_t, capacity C.size_t, n *C.size_t) *C.kva_error {
		return C.kva_session_get_tokens(s.handle, tokens, capacity, n)
	})
}

// Truncate forgets every token from length on, and the logits with them.
func (s *Session) Truncate(length int) error {
	if length < 0 {
		return &Error{Code: ErrInvalidArgument, Message: fmt.Sprintf("cannot truncate to %d tokens", length)}
	}
	return s.use(func() *C.kva_error { return C.kva_session_truncate(s.handle, C.size_t(length)) })
}

// Prefill appends tokens. If logits is not nil it must have a place for each token of the vocabulary, and gets the logits
// after the last token. After an error the session is as it was.
func (s *Session) Prefill(ctx context.Context, tokens []uint32, logits []float32) error {
	return s.useContext(ctx, func() *C.kva_error {
		return C.kva_session_prefill(s.handle, tokenPointer(tokens), count(tokens), floatPointer(logits), count(logits))
	})
}

// Fill fills an empty session with count tokens whose keys and values are random numbers from seed. Nothing is computed: it
// is for measuring decode at lengths that take too long to prefill.
func (s *Session) Fill(count int, seed uint64) error {
	if count < 0 {
		return &Error{Code: ErrInvalidArgument, Message: fmt.Sprintf("cannot fill a session with %d tokens", count)}
	}
	return s.use(func() *C.kva_error { return C.kva_session_fill(s.handle, C.size_t(count), C.uint64_t(seed)) })
}

// Score appends tokens, and returns the log-probability of each after everything before it: NaN for the first token of an
// empty session.
func (s *Session) Score(ctx context.Context, tokens []uint32) ([]float32, error) {
	scores := make([]float32, len(tokens))
	err := s.useContext(ctx, func() *C.kva_error {
		return C.kva_session_score(s.handle, tokenPointer(tokens), count(tokens), floatPointer(scores))
	})
	if err != nil {
		return nil, err
	}
	return scores, nil
}

// Decode appends one token. Logits as in Prefill.
func (s *Session) Decode(ctx context.Context, token uint32, logits []float32) error {
	return s.useContext(ctx, func() *C.kva_error {
		return C.kva_session_decode(s.handle, C.uint32_t(token), floatPointer(logits), count(logits))
	})
}

// DecodeBatch appends tokens[i] to sessions[i], all of one model, in one step: all of them, or none. If logits is not nil
// it has a row of the vocabulary's size for each session.
func DecodeBatch(ctx context.Context, sessions []*Session, tokens []uint32, logits []float32) error {
	if len(sessions) != len(tokens) {
		message := fmt.Sprintf("%d tokens for %d sessions; one each is needed", len(tokens), len(sessions))
		return &Error{Code: ErrInvalidArgument, Message: message}
	}
	if err := checkDistinct(sessions); err != nil {
		return err
	}
	var a arena
	defer a.free()
	handles := alloc[*C.kva_session](&a, len(sessions))
	for i, s := range sessions {
		if err := s.acquire(); err != nil {
			return err
		}
		defer s.release()
		handles[i] = s.handle
	}
	return cancellable(ctx, sessions, func() *C.kva_error {
		return C.kva_batch_decode(pointer(handles), tokenPointer(tokens), count(handles), floatPointer(logits), count(logits))
	})
}

// checkDistinct finds nil and repeated sessions, which would look busy or crash.
func checkDistinct(sessions []*Session) error {
	sorted := append([]*Session(nil), sessions...)
	address := func(s *Session) uintptr { return uintptr(unsafe.Pointer(s)) }
	sort.Slice(sorted, func(i, j int) bool { return address(sorted[i]) < address(sorted[j]) })
	for i, s := range sorted {
		if s == nil {
			return &Error{Code: ErrInvalidArgument, Message: "one of the sessions is nil"}
		}
		if i > 0 && s == sorted[i-1] {
			return &Error{Code: ErrInvalidArgument, Message: "a session is given twice"}
		}
	}
	return nil
}

// Logits writes the logits after the last token, of the last prefill, score or decode. It must have a place for each token
// of the vocabulary.
func (s *Session) Logits(logits []float32) error {
	return s.use(func() *C.kva_error { return C.kva_session_get_logits(s.handle, floatPointer(logits), count(logits)) })
}

// Sample picks the next token from the logits of the last prefill or decode. It appends nothing. Options may be nil.
func (s *Session) Sample(options *SamplingOptions) (uint32, error) {
	var a arena
	defer a.free()
	c, err := a.sampling(options)
	if err != nil {
		return 0, err
	}
	var token C.uint32_t
	err = s.use(func() *C.kva_error { return C.kva_session_sample(s.handle, c, &token) })
	return uint32(token), err
}

// Statistics are counts and times since the session began or since the last reset, and the KV held now.
type Statistics struct {
	PrefillTokens  uint64
	PrefillSeconds float64
	DecodeTokens   uint64
	DecodeSeconds  float64
	SampledTokens  uint64
	SampleSeconds  float64
	KVDeviceBytes  uint64
	KVPinnedBytes  uint64
	KVFileBytes    uint64

	// What the policy did in decode. An entry is the key and value of one token of one KV head of one layer.
	KVSteps            uint64 // decode steps
	KVSelected         uint64 // past entries selected (or attended), over speculated layers
	KVCandidates       uint64 // past entries that there were, over speculated layers
	KVAttended         uint64 // entries attended, over all layers
	KVHeld             uint64 // entries that full attention would have attended, over all layers
	KVHits             uint64 // selected entries that were on the device already
	KVMisses           uint64 // selected entries that were fetched
	KVHostFetchedBytes uint64
	KVFileFetchedBytes uint64  // as the entries need them
	KVFileReadBytes    uint64  // really read: whole blocks, gaps included
	KVReadSeconds      float64 // reads from files were in flight
	KVWaitSeconds      float64 // steps stood still for them
	KVEvicted          uint64  // entries overwritten because there was no more room
	KVCorrected        uint64  // selected entries that a correction has added
	KVLinkSeconds      float64 // entries were on their way from host memory, where that is measured ([Model.SetTiming])
	KVIndexBytes       uint64  // of KVDeviceBytes: the speculation index
	KVCacheBytes       uint64  // of KVDeviceBytes: the hot cache and its tables
	ScratchBytes       uint64  // of the model, in device memory
	ScratchPinnedBytes uint64  // of the model, in pinned host memory
}

// Statistics says what the session has done.
func (s *Session) Statistics() (Statistics, error) {
	c := C.kva_statistics{struct_size: C.sizeof_kva_statistics}
	if err := s.use(func() *C.kva_error { return C.kva_session_get_statistics(s.handle, &c) }); err != nil {
		return Statistics{}, err
	}
	return Statistics{
		PrefillTokens:  uint64(c.prefill_tokens),
		PrefillSeconds: float64(c.prefill_seconds),
		DecodeTokens:   uint64(c.decode_tokens),
		DecodeSeconds:  float64(c.decode_seconds),
		SampledTokens:  uint64(c.sampled_tokens),
		SampleSeconds:  float64(c.sample_seconds),
		KVDeviceBytes:  uint64(c.kv_device_bytes),
		KVPinnedBytes:  uint64(c.kv_pinned_bytes),
		KVFileBytes:    uint64(c.kv_file_bytes),

		KVSteps:            uint64(c.kv_steps),
		KVSelected:         uint64(c.kv_selected),
		KVCandidates:       uint64(c.kv_candidates),
		KVAttended:         uint64(c.kv_attended),
		KVHeld:             uint64(c.kv_held),
		KVHits:             uint64(c.kv_hits),
		KVMisses:           uint64(c.kv_misses),
		KVHostFetchedBytes: uint64(c.kv_host_fetched_bytes),
		KVFileFetchedBytes: uint64(c.kv_file_fetched_bytes),
		KVFileReadBytes:    uint64(c.kv_file_read_bytes),
		KVReadSeconds:      float64(c.kv_read_seconds),
		KVWaitSeconds:      float64(c.kv_wait_seconds),
		KVEvicted:          uint64(c.kv_evicted),
		KVCorrected:        uint64(c.kv_corrected),
		KVLinkSeconds:      float64(c.kv_link_seconds),
		KVIndexBytes:       uint64(c.kv_index_bytes),
		KVCacheBytes:       uint64(c.kv_cache_bytes),
		ScratchBytes:       uint64(c.scratch_bytes),
		ScratchPinnedBytes: uint64(c.scratch_pinned_bytes),
	}, nil
}

// ResetStatistics sets counts and times to zero.
func (s *Session) ResetStatistics() error {
	return s.use(func() *C.kva_error { return C.kva_session_reset_statistics(s.handle) })
}

func floatPointer(values []float32) *C.float { return (*C.float)(unsafe.Pointer(pointer(values))) }
