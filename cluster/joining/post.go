package joining

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// Patience is how long one request may take.
const Patience = 20 * time.Second

// Post sends one request over a connection of its own, and reads the answer. What
// the other end does not grant is a *Refusal.
func Post(ctx context.Context, dial func(context.Context) (net.Conn, error), path string, ask, answer any) error {
	body, err := json.Marshal(ask)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	client := &http.Transport{
		// The transport's own context would let a dial outlive the request.
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return dial(ctx) },
		DisableKeepAlives: true,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://node"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := client.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if len(text) > maxAnswer {
		return errors.New("the answer is too long")
	}
	if resp.StatusCode == http.StatusOK {
		if err := json.Unmarshal(text, answer); err != nil {
			return fmt.Errorf("reading the answer: %w", err)
		}
		return nil
	}
	var no Refusal
	if err := json.Unmarshal(text, &no); err != nil || no.Code == "" {
		return fmt.Errorf("the node answered %d: %.200q", resp.StatusCode, text)
	}
	return &no
}
