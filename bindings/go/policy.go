package kvahead

// #include <kvahead.h>
import "C"

// Policy is what a layer attends.
type Policy int32

// The policies.
const (
	Full      Policy = C.KVA_POLICY_FULL      // every token: exact
	Int4      Policy = C.KVA_POLICY_INT4      // every token, from entries of 4 bits a value (FlexGen)
	H2O       Policy = C.KVA_POLICY_H2O       // what got much attention so far, and the recent tokens; the rest is dropped
	Window    Policy = C.KVA_POLICY_WINDOW    // the first tokens and the recent ones (StreamingLLM)
	Infinigen Policy = C.KVA_POLICY_INFINIGEN // what speculation selects, one layer ahead
)

// KVTier is where KV is kept that a policy does not hold on the device.
type KVTier int32

// The tiers.
const (
	DeviceTier KVTier = C.KVA_KV_TIER_DEVICE // device memory (main memory, where the device is the processor)
	HostTier   KVTier = C.KVA_KV_TIER_HOST   // host memory, pinned for a GPU
	FileTier   KVTier = C.KVA_KV_TIER_FILE
)

// KVPayload is how KV is stored there.
type KVPayload int32

// The payloads.
const (
	ExactPayload KVPayload = C.KVA_KV_PAYLOAD_EXACT // as on the device
	Int8Payload  KVPayload = C.KVA_KV_PAYLOAD_INT8
	Int4Payload  KVPayload = C.KVA_KV_PAYLOAD_INT4
)

// KVFileFlags say how a KV file is used. Combine with |.
type KVFileFlags uint32

// The flags.
const (
	KeepFile     KVFileFlags = C.KVA_KV_FILE_KEEP     // leave it in its place, instead of unlinking it when it is open
	BufferedFile KVFileFlags = C.KVA_KV_FILE_BUFFERED // through the page cache, instead of direct I/O
	ChecksumFile KVFileFlags = C.KVA_KV_FILE_CHECKSUM // keep a checksum of every row, and compare it on every read
)

// Eviction is which entry gives way when there is no more room for KV.
type Eviction int32

// The evictions.
const (
	EvictionOff     Eviction = C.KVA_EVICTION_OFF     // none: [ErrCapacity] before the step begins
	EvictionFIFO    Eviction = C.KVA_EVICTION_FIFO    // the oldest
	EvictionLRU     Eviction = C.KVA_EVICTION_LRU     // the one selected longest ago
	EvictionCounter Eviction = C.KVA_EVICTION_COUNTER // the one selected least often
)

// InfinigenMode is which defaults [NewInfinigenOptions] gives.
type InfinigenMode int32

// The modes.
const (
	InfinigenDefault InfinigenMode = C.KVA_INFINIGEN_DEFAULT // what serves best, by measurement
	InfinigenPaper   InfinigenMode = C.KVA_INFINIGEN_PAPER   // the paper's own settings, and nothing else
)

// IndexBasis is what the index is columns of.
type IndexBasis int32

// The bases.
const (
	BalancedIndex IndexBasis = C.KVA_INDEX_BALANCED // balanced over queries and keys, rotated to random positions
	SkewedIndex   IndexBasis = C.KVA_INDEX_SKEWED   // the paper's skew
	PlainIndex    IndexBasis = C.KVA_INDEX_PLAIN    // the head's own columns
	PromptIndex   IndexBasis = C.KVA_INDEX_PROMPT   // the paper's skew, by the prompt's own queries
)

// Predictor is what predicts a layer's queries from the layer before.
type Predictor int32

// The predictors.
const (
	// FittedPredictor is the layer's query weight, corrected by regression on the calibration text.
	FittedPredictor Predictor = C.KVA_PREDICTOR_FITTED
	// OwnPredictor is the layer's query weight on the previous layer's normalised input (the paper).
	OwnPredictor Predictor = C.KVA_PREDICTOR_OWN
	// RenormalisedPredictor is the same, normalised as this layer does.
	RenormalisedPredictor Predictor = C.KVA_PREDICTOR_RENORMALISED
	// ExactPredictor is the true query: how well a perfect predictor would do.
	ExactPredictor Predictor = C.KVA_PREDICTOR_EXACT
)

// Rule is how tokens are picked by their speculated scores.
type Rule int32

// The rules.
const (
	ShareRule       Rule = C.KVA_RULE_SHARE       // a fixed share of the tokens
	ProbabilityRule Rule = C.KVA_RULE_PROBABILITY // every token whose log-probability is above a threshold
	PaperRule       Rule = C.KVA_RULE_PAPER       // within Alpha of the greatest score, equally many in each head
	RandomRule      Rule = C.KVA_RULE_RANDOM      // random tokens, for measuring
	ReplayRule      Rule = C.KVA_RULE_REPLAY      // what a trace selected, stretched, for measuring
)

// Budget is a number of tokens: a share of those that a session holds, or, if Tokens is not 0, a fixed number.
type Budget struct {
	Share  float32
	Tokens uint64
}

// InfinigenOptions are the settings of [Infinigen]. Their zero value means nothing: get one from [NewInfinigenOptions], and
// change it. Shares are of the tokens that a session holds.
type InfinigenOptions struct {
	Mode           InfinigenMode
	Basis          IndexBasis
	Ratio          float32 // columns of the index as a share of the head dimension
	IndexBits      uint32  // of a number in the index: 4, 8 or 32
	Predictor      Predictor
	Rule           Rule
	SelectShare    float32 // ShareRule: share of the tokens to select
	SelectBelow    float32 // ProbabilityRule: how far below 1, as a natural logarithm
	Alpha          float32 // PaperRule: how far below the greatest score
	SelectCap      float32 // ProbabilityRule, PaperRule, ReplayRule: most to select, as a share
	Random         Budget  // RandomRule: tokens to select
	RandomRenewed  float32 // RandomRule: share of them that are others in the next step
	Sinks          uint32  // first tokens, always attended
	Window         uint32  // last tokens, always attended
	ResidentLayers uint32  // first layers, attended in full from device memory
	Cache          Budget  // entries that each layer and KV head keeps on the device
	CacheLeast     uint64  // fewest of them: a shorter sequence is attended in full
	AttendCache    bool    // attend everything that is on the device, selected or not
	Tail           bool    // attend also one entry that stands for everything else
	Correct        float32 // most to add when the true queries have come, as a share; 0: nothing
	ReplayPath     string  // ReplayRule: the trace
}

// NewInfinigenOptions gives the library's defaults for a mode.
func NewInfinigenOptions(mode InfinigenMode) (*InfinigenOptions, error) {
	var c C.kva_infinigen_options
	if err := take(C.kva_infinigen_options_init(&c, C.sizeof_kva_infinigen_options, C.int32_t(mode))); err != nil {
		return nil, err
	}
	return &InfinigenOptions{
		Mode:           mode,
		Basis:          IndexBasis(c.basis),
		Ratio:          float32(c.ratio),
		IndexBits:      uint32(c.index_bits),
		Predictor:      Predictor(c.predictor),
		Rule:           Rule(c.rule),
		SelectShare:    float32(c.select_share),
		SelectBelow:    float32(c.select_below),
		Alpha:          float32(c.alpha),
		SelectCap:      float32(c.select_cap),
		Random:         Budget{float32(c.select_share), uint64(c.select_tokens)},
		RandomRenewed:  float32(c.select_renewed),
		Sinks:          uint32(c.sinks),
		Window:         uint32(c.window),
		ResidentLayers: uint32(c.resident_layers),
		Cache:          Budget{float32(c.cache_share), uint64(c.cache_tokens)},
		CacheLeast:     uint64(c.cache_least),
		AttendCache:    c.attend_cache != 0,
		Tail:           c.tail != 0,
		Correct:        float32(c.correct),
	}, nil
}

func (a *arena) infinigen(o *InfinigenOptions) (*C.kva_infinigen_options, error) {
	if o == nil {
		return nil, nil
	}
	c := &alloc[C.kva_infinigen_options](a, 1)[0]
	if err := take(C.kva_infinigen_options_init(c, C.sizeof_kva_infinigen_options, C.int32_t(o.Mode))); err != nil {
		return nil, err
	}
	var err error
	if c.replay_path, err = a.optionalText("ReplayPath", o.ReplayPath); err != nil {
		return nil, err
	}
	c.basis = C.int32_t(o.Basis)
	c.ratio = C.float(o.Ratio)
	c.index_bits = C.uint32_t(o.IndexBits)
	c.predictor = C.int32_t(o.Predictor)
	c.rule = C.int32_t(o.Rule)
	c.select_share = C.float(o.SelectShare)
	c.select_below = C.float(o.SelectBelow)
	c.alpha = C.float(o.Alpha)
	c.select_cap = C.float(o.SelectCap)
	if o.Rule == RandomRule {
		c.select_share = C.float(o.Random.Share)
		c.select_tokens = C.uint64_t(o.Random.Tokens)
		c.select_renewed = C.float(o.RandomRenewed)
	}
	c.sinks = C.uint32_t(o.Sinks)
	c.window = C.uint32_t(o.Window)
	c.resident_layers = C.uint32_t(o.ResidentLayers)
	c.cache_share = C.float(o.Cache.Share)
	c.cache_tokens = C.uint64_t(o.Cache.Tokens)
	c.cache_least = C.uint64_t(o.CacheLeast)
	c.attend_cache = 0
	if o.AttendCache {
		c.attend_cache = 1
	}
	c.tail = 0
	if o.Tail {
		c.tail = 1
	}
	c.correct = C.float(o.Correct)
	return c, nil
}

// session returns the C form of options; nil means the defaults.
func (a *arena) session(o *SessionOptions) (*C.kva_session_options, error) {
	c := &alloc[C.kva_session_options](a, 1)[0]
	if err := take(C.kva_session_options_init(c, C.sizeof_kva_session_options)); err != nil || o == nil {
		return c, err
	}
	var err error
	if c.kv_file_path, err = a.optionalText("KVFilePath", o.KVFilePath); err != nil {
		return nil, err
	}
	if c.trace_path, err = a.optionalText("TracePath", o.TracePath); err != nil {
		return nil, err
	}
	if c.infinigen, err = a.infinigen(o.Infinigen); err != nil {
		return nil, err
	}
	c.policy = C.int32_t(o.Policy)
	c.kv_dtype = C.int32_t(o.KVDType)
	c.capacity = C.uint64_t(o.Capacity)
	c.prefill_chunk = C.uint32_t(o.PrefillChunk)
	c.kv_tier = C.int32_t(o.KVTier)
	c.kv_payload = C.int32_t(o.KVPayload)
	c.kv_file_limit_bytes = C.uint64_t(o.KVFileLimitBytes)
	c.kv_file_flags = C.uint32_t(o.KVFileFlags)
	if o.Budget != (Budget{}) {
		c.budget_share = C.float(o.Budget.Share)
		c.budget_tokens = C.uint64_t(o.Budget.Tokens)
	}
	if o.Sinks != nil {
		c.sinks = C.uint32_t(*o.Sinks)
	}
	if o.ResidentLayers != nil {
		c.resident_layers = C.uint64_t(*o.ResidentLayers)
	}
	c.eviction = C.int32_t(o.Eviction)
	c.pool_tokens = C.uint64_t(o.PoolTokens)
	return c, nil
}
