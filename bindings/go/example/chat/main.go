// Chat talks with a model: a conversation from the terminal, or one question by flag.
//
//	chat -model model.gguf
//	chat -model model.gguf -question 'Why is the sky blue?'
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	kvahead "github.com/kvahead/kvahead/bindings/go"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "chat:", strings.TrimPrefix(err.Error(), "kvahead: "))
		os.Exit(1)
	}
}

func run() error {
	path := flag.String("model", "", "a Hugging Face folder or a .gguf `file` (needed)")
	system := flag.String("system", "", "system `message`")
	question := flag.String("question", "", "answer this `text` and exit")
	threads := flag.Uint("threads", 0, "threads to compute with; 0: all processors")
	limit := flag.Uint64("n", 512, "most `tokens` of an answer")
	temperature := flag.Float64("temperature", 0, "0 picks the likeliest token")
	seed := flag.Uint64("seed", 0, "of the draws")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "Talks with a model. Ctrl-C stops an answer; an empty line or Ctrl-D ends the talk.\n\nUsage: chat -model FILE [flags]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if *path == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}

	model, err := kvahead.Load(*path, &kvahead.ModelOptions{Threads: uint32(*threads)})
	if err != nil {
		return err
	}
	defer model.Close()
	session, err := model.NewSession(nil)
	if err != nil {
		return err
	}
	defer session.Close()
	talk := conversation{
		model:   model,
		session: session,
		options: kvahead.GenerateOptions{
			MaxTokens: *limit,
			Sampling:  kvahead.SamplingOptions{Temperature: float32(*temperature), Seed: *seed},
		},
	}
	if *system != "" {
		talk.messages = append(talk.messages, kvahead.Message{Role: "system", Content: *system})
	}
	if *question != "" {
		return talk.answer(*question)
	}
	return talk.interactive(os.Stdin)
}

// conversation keeps what was said, and a session that holds as much of it as is the same as last time.
type conversation struct {
	model    *kvahead.Model
	session  *kvahead.Session
	options  kvahead.GenerateOptions
	messages []kvahead.Message
}

func (c *conversation) interactive(input io.Reader) error {
	lines := bufio.NewScanner(input)
	for {
		fmt.Print("> ")
		if !lines.Scan() || lines.Text() == "" {
			fmt.Println()
			return lines.Err()
		}
		if err := c.answer(lines.Text()); err != nil {
			if errors.Is(err, kvahead.ErrCapacity) {
				return fmt.Errorf("the conversation has become longer than the model's context: %w", err)
			}
			return err
		}
	}
}

// answer streams the model's answer to a question. Ctrl-C stops it, which is no error.
func (c *conversation) answer(question string) error {
	c.messages = append(c.messages, kvahead.Message{Role: "user", Content: question})
	prompt, err := c.prompt()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var text strings.Builder
	_, err = c.session.Generate(ctx, prompt, &c.options, func(piece kvahead.Piece) error {
		text.WriteString(piece.Text)
		_, err := fmt.Print(piece.Text)
		return err
	})
	fmt.Println()
	if err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	c.messages = append(c.messages, kvahead.Message{Role: "assistant", Content: text.String()})
	return nil
}

// prompt returns the tokens of the conversation that the session does not hold yet, and cuts the session back to where the
// two part. At least one token is left to prefill, since a cut forgets the logits.
func (c *conversation) prompt() ([]uint32, error) {
	text, err := c.model.ApplyChatTemplate(c.messages, true)
	if err != nil {
		return nil, err
	}
	tokens, err := c.model.Tokenize(text, kvahead.ParseSpecial)
	if err != nil {
		return nil, err
	}
	held, err := c.session.Tokens()
	if err != nil {
		return nil, err
	}
	same := 0
	for same < len(held) && same < len(tokens)-1 && held[same] == tokens[same] {
		same++
	}
	return tokens[same:], c.session.Truncate(same)
}
