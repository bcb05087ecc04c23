package kvahead

// #include <kvahead.h>
import "C"

// DType is a type of numbers in memory.
type DType int32

// The types.
const (
	DTypeAuto DType = C.KVA_DTYPE_AUTO // as stored; quantized weights as they are where that can be, else in bf16
	F32       DType = C.KVA_DTYPE_F32
	F16       DType = C.KVA_DTYPE_F16
	BF16      DType = C.KVA_DTYPE_BF16
)

func (d DType) String() string {
	switch d {
	case DTypeAuto:
		return "auto"
	case F32:
		return "f32"
	case F16:
		return "f16"
	case BF16:
		return "bf16"
	}
	return "unknown"
}

// Device is where a model computes.
type Device int32

// The devices.
const (
	DeviceAuto Device = C.KVA_DEVICE_AUTO // CUDA where it works, and the processor otherwise
	CPU        Device = C.KVA_DEVICE_CPU
	CUDA       Device = C.KVA_DEVICE_CUDA // the first CUDA device; ErrDevice where there is none
)

// Timing is what decode steps measure of themselves.
type Timing int32

// What can be measured.
const (
	TimingOff        Timing = C.KVA_TIMING_OFF
	TimingFetches    Timing = C.KVA_TIMING_FETCHES    // KVLinkSeconds of [Statistics]
	TimingOperations Timing = C.KVA_TIMING_OPERATIONS // everything, for [Model.WriteTimeline]
)

// LogLevel is how much a log line matters.
type LogLevel int32

// The levels.
const (
	LogError   LogLevel = C.KVA_LOG_ERROR
	LogWarning LogLevel = C.KVA_LOG_WARNING
	LogInfo    LogLevel = C.KVA_LOG_INFO
	LogDebug   LogLevel = C.KVA_LOG_DEBUG
)

// TokenizeFlags say how a text is read. Combine with |.
type TokenizeFlags uint32

// The flags.
const (
	// AddSpecial adds what the tokenizer puts around a text, such as a begin-of-text token.
	AddSpecial TokenizeFlags = C.KVA_TOKENIZE_ADD_SPECIAL
	// ParseSpecial lets names such as <|im_start|> in the text mean the token. For trusted text only.
	ParseSpecial TokenizeFlags = C.KVA_TOKENIZE_PARSE_SPECIAL
)

// DetokenizeFlags say how tokens are written.
type DetokenizeFlags uint32

// SkipSpecial leaves special tokens out of the text.
const SkipSpecial DetokenizeFlags = C.KVA_DETOKENIZE_SKIP_SPECIAL

// ModelOptions say how to load a model.
type ModelOptions struct {
	Device       Device
	DType        DType  // type of the weights in memory
	Threads      uint32 // 0: every processor that the process may use
	CopyWeights  bool   // read all weights; else matrices of a folder stay in its mapped files
	KVLimitBytes uint64 // KV of all sessions together; 0: no limit

	// Progress is called while loading with the fraction loaded. An error stops the loading, which returns it.
	Progress func(fraction float32) error
	// Log is called with each log line, from any goroutine or none, maybe several at once. It must not use the model.
	Log      func(level LogLevel, message string)
	LogLevel LogLevel // 0: LogInfo

	// SpeculationCachePath is a folder for what is learnt from the calibration text; empty: next to the model.
	SpeculationCachePath string
	// CalibrationText is plain prose of at least 2,048 tokens; empty: a text of the library's own.
	CalibrationText string
}

// SessionOptions say how to create a session.
type SessionOptions struct {
	Policy       Policy
	KVDType      DType  // type of keys and values; DTypeAuto: that of the weights
	Capacity     uint64 // tokens; 0: the model's context length
	PrefillChunk uint32 // tokens of a prompt that run at once; 0: the library's choice

	KVTier           KVTier // of the KV that the policy does not hold on the device
	KVPayload        KVPayload
	KVFilePath       string // FileTier: made anew for the session; empty: a nameless file in the temporary folder
	KVFileLimitBytes uint64 // FileTier: 0: what Capacity needs
	KVFileFlags      KVFileFlags

	Budget   Budget   // Window, H2O: tokens to attend, sinks included; the zero value: the library's choice
	Sinks    *uint32  // Window: first tokens, always attended; nil: the library's choice
	Eviction Eviction // Infinigen
	// ResidentLayers, of Window, are first layers whose tokens are all attended; nil: the library's choice
	ResidentLayers *uint64
	PoolTokens     uint64 // Infinigen: most tokens to keep, in each layer and KV head; 0: as many as there is room for
	Infinigen      *InfinigenOptions
	TracePath      string // what was selected and fetched goes to this file; empty: nowhere
}

// SamplingOptions say how to pick a token. The zero value picks the likeliest.
type SamplingOptions struct {
	Temperature       float32 // 0: greedy
	TopK              uint32  // 0: off
	TopP              float32 // 0 or 1: off
	MinP              float32 // 0: off
	RepetitionPenalty float32 // 0 or 1: off
	FrequencyPenalty  float32
	PresencePenalty   float32
	PenaltyWindow     uint32 // last tokens that the penalties look at; 0: all
	Seed              uint64
	LogitBias         map[uint32]float32 // added to the logits of tokens; -Inf forbids a token
}

// GenerateOptions say how to generate.
type GenerateOptions struct {
	MaxTokens             uint64 // 0: until the text ends or the session is full
	Sampling              SamplingOptions
	StopTokens            []uint32 // besides the model's own
	IgnoreModelStopTokens bool
	StopStrings           []string // end the text, and are not part of it
}
