package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// logins is the file of saved credentials, readable by its owner only.
type logins struct {
	Last    string           `json:"last"`
	Servers map[string]login `json:"servers"`
}

type login struct {
	Username string `json:"username"`
	Password string `json:"password"`
	CA       string `json:"ca,omitempty"` // PEM
}

func loginsFile() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "atoll", "logins.json"), nil
}

func readLogins() (logins, error) {
	saved := logins{Servers: map[string]login{}}
	name, err := loginsFile()
	if err != nil {
		return saved, nil // no home directory: nothing was saved
	}
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return saved, nil
	}
	if err != nil {
		return saved, err
	}
	if err := json.Unmarshal(data, &saved); err != nil {
		return saved, fmt.Errorf("%s is damaged: %w; delete it and log in again", name, err)
	}
	return saved, nil
}

func (l logins) write() error {
	name, err := loginsFile()
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	temp := name + ".new"
	if err := os.WriteFile(temp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, name)
}

func newLogin() *cobra.Command {
	var username string
	var fromStdin bool
	cmd := &cobra.Command{
		Use:   "login --server URL",
		Short: "Check credentials with a node and save them for later commands",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			server, _ := cmd.Flags().GetString("server")
			if server == "" {
				return usageError{errors.New("atoll login needs --server URL")}
			}
			password, err := readPassword(cmd, username, fromStdin)
			if err != nil {
				return err
			}
			saved, err := readLogins()
			if err != nil {
				return err
			}
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			c.username, c.password = username, password
			if err := c.call(cmd.Context(), "GET", "/api/atoll/v1/site", nil, nil); err != nil {
				return err
			}
			entry := login{Username: username, Password: password, CA: saved.Servers[c.base].CA}
			if ca, _ := cmd.Flags().GetString("ca"); ca != "" {
				pem, err := os.ReadFile(ca)
				if err != nil {
					return err
				}
				entry.CA = string(pem)
			}
			saved.Last, saved.Servers[c.base] = c.base, entry
			if err := saved.write(); err != nil {
				return err
			}
			return done(cmd, map[string]string{"server": c.base, "username": username}, "logged in to %s as %s", c.base, username)
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().StringVarP(&username, "username", "u", "admin", "login name")
	cmd.Flags().BoolVar(&fromStdin, "password-stdin", false, "read the password from standard input")
	return cmd
}

func readPassword(cmd *cobra.Command, username string, fromStdin bool) (string, error) {
	if value := os.Getenv("ATOLL_PASSWORD"); value != "" {
		return value, nil
	}
	if !fromStdin && terminal(cmd.InOrStdin()) {
		fmt.Fprintf(cmd.ErrOrStderr(), "password of %s: ", username)
		data, err := term.ReadPassword(int(os.Stdin.Fd()))
		fmt.Fprintln(cmd.ErrOrStderr())
		return string(data), err
	}
	line, err := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	if line = strings.TrimRight(line, "\r\n"); line == "" {
		return "", usageError{fmt.Errorf("no password on standard input: %w", err)}
	}
	return line, nil
}
