package jobs

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
)

// State of a job, in Harbor's words.
type State string

const (
	Pending   State = "Pending"   // it waits for a node
	Running   State = "Running"   // a node works on it
	Scheduled State = "Scheduled" // its time is still to come, once or again and again
	Stopped   State = "Stopped"   // somebody cancelled it
	Error     State = "Error"     // it failed as often as it may
	Success   State = "Success"
)

// Final says that nothing happens to a job in this state any more.
func (s State) Final() bool { return s == Stopped || s == Error || s == Success }

// row is a job as all nodes have it.
type row struct {
	Kind    string `cbor:"kind"`
	Payload []byte `cbor:"payload"` // JSON
	State   State  `cbor:"state"`
	By      string `cbor:"by"`
	Cron    string `cbor:"cron,omitempty"`

	CreatedAt int64 `cbor:"created_at"` // Unix seconds, as all times here
	UpdatedAt int64 `cbor:"updated_at"`
	DueAt     int64 `cbor:"due_at"`

	Attempt int    `cbor:"attempt"` // failures in a row
	Owner   string `cbor:"owner,omitempty"`
	Beat    uint64 `cbor:"beat,omitempty"` // counts up while the owner works
	Cancel  bool   `cbor:"cancel,omitempty"`

	Runs     int      `cbor:"runs"`
	LastRun  State    `cbor:"last_run,omitempty"` // how the last run ended
	Failure  string   `cbor:"failure,omitempty"`  // of the last run
	Progress []byte   `cbor:"progress,omitempty"` // JSON
	Log      []string `cbor:"log,omitempty"`
}

// Job as others see it.
type Job struct {
	ID        string          `json:"id"`
	Kind      string          `json:"kind"`
	State     State           `json:"state"`
	By        string          `json:"by"`
	Cron      string          `json:"cron,omitempty"`
	CreatedAt time.Time       `json:"created_at"`
	UpdatedAt time.Time       `json:"updated_at"`
	DueAt     time.Time       `json:"due_at"`
	Attempt   int             `json:"attempt"`
	Node      string          `json:"node,omitempty"` // that works on it
	Runs      int             `json:"runs"`
	LastRun   State           `json:"last_run,omitempty"`
	Failure   string          `json:"failure,omitempty"`
	Payload   json.RawMessage `json:"payload"`
	Progress  json.RawMessage `json:"progress,omitempty"`
	Log       []string        `json:"log"`
}

func (r row) job(id string) Job {
	at := func(s int64) time.Time { return time.Unix(s, 0).UTC() }
	return Job{
		ID: id, Kind: r.Kind, State: r.State, By: r.By, Cron: r.Cron, CreatedAt: at(r.CreatedAt), UpdatedAt: at(r.UpdatedAt), DueAt: at(r.DueAt),
		Attempt: r.Attempt, Node: r.Owner, Runs: r.Runs, LastRun: r.LastRun, Failure: r.Failure, Payload: r.Payload, Progress: r.Progress,
		Log: append([]string{}, r.Log...),
	}
}

// Bounds of what a row holds.
const (
	maxPayload  = 64 << 10
	maxProgress = 64 << 10
	maxLines    = 100
	maxLine     = 300
)

// note adds a line to the log of a job, whose oldest lines go.
func (r *row) note(lines ...string) {
	r.Log = append(r.Log, lines...)
	if n := len(r.Log); n > maxLines {
		r.Log = r.Log[n-maxLines:]
	}
}

func line(at time.Time, format string, args ...any) string {
	text := strings.ToValidUTF8(strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " "), "?")
	if len(text) > maxLine {
		text = strings.ToValidUTF8(text[:maxLine], "") + "..."
	}
	return at.UTC().Format(time.DateTime) + " " + text
}

// ParseCron reads when something is done again: five fields (minute, hour, day of
// the month, month, day of the week), or @hourly, @daily, @weekly, @monthly.
func ParseCron(text string) (cron.Schedule, error) {
	if strings.HasPrefix(text, "@every") || strings.Contains(text, "TZ=") {
		return nil, fmt.Errorf("%.60q: @every and time zones are not taken; write five fields, such as 30 2 * * Mon-Fri", text)
	}
	s, err := cron.ParseStandard(text)
	if err != nil {
		return nil, fmt.Errorf("%.60q is no schedule; write five fields (minute hour day month weekday), such as 30 2 * * Mon-Fri: %w", text, err)
	}
	return s, nil
}
