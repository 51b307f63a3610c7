package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node"
	"github.com/atoll-registry/atoll/node/settings"
	"github.com/atoll-registry/atoll/node/telemetry"
)

func newServe() *cobra.Command {
	c := node.Config{Version: version}
	var tokenFile, logLevel, storageKind, cacheSize string
	var storageConfig []string
	var keys func() (node.Keys, error)
	cmd := &cobra.Command{
		Use:   "serve [--init | --join ADDR --token TOKEN | --join ADDRS --bootstrap-expect N --token-file FILE]",
		Short: "Run a node",
		Long: `Run a node of a site: a registry for its clients, a peer for its other nodes.

An empty data directory needs to be told what to become: --init founds a site,
--join with a token of atoll token create joins one. Machines that are all given
one command line, with --bootstrap-expect and a token of atoll token create
--bootstrap, found one site together. Later starts need none of it.
Every flag has a variable: --peer-listen is ATOLL_PEER_LISTEN. The first password
of admin comes from ATOLL_ADMIN_PASSWORD or the file ATOLL_ADMIN_PASSWORD_FILE,
else one is made and kept in DATA/admin-password.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if c.Log, err = newLogger(cmd, logLevel); err != nil {
				return err
			}
			if c.Storage, err = storageChoice(storageKind, storageConfig); err != nil {
				return err
			}
			if c.CacheSize, err = parseCacheSize(c.Cache, cacheSize); err != nil {
				return err
			}
			if c.Keys, err = keys(); err != nil {
				return err
			}
			if tokenFile != "" && c.Token != "" {
				return usageError{errors.New("--token and --token-file are two ways to say the same: choose one")}
			}
			if tokenFile != "" {
				if c.Token, err = secretFile(tokenFile); err != nil {
					return err
				}
			}
			c.AdminPassword = os.Getenv("ATOLL_ADMIN_PASSWORD")
			if file := os.Getenv("ATOLL_ADMIN_PASSWORD_FILE"); c.AdminPassword == "" && file != "" {
				if c.AdminPassword, err = secretFile(file); err != nil {
					return err
				}
			}
			c.Started = func(s node.Started) { welcome(cmd.OutOrStdout(), s) }
			c.Snapshots.Eager = c.Snapshots.MinBytes > 0
			n, err := node.New(cmd.Context(), c)
			if err != nil {
				return err
			}
			return n.Run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.BoolVar(&c.Init, "init", false, "found a site when the data directory is empty")
	f.StringSliceVar(&c.Join, "join", nil, "peer addresses of nodes of the site to join when the data directory is empty")
	f.IntVar(&c.Expect, "bootstrap-expect", 0, "with --join and a token of atoll token create --bootstrap: so many machines found a site together")
	f.StringVar(&c.Token, "token", "", "token of atoll token create, for --join")
	f.StringVar(&tokenFile, "token-file", "", "file with the token")
	f.StringVar(&c.Data, "data", "", "data directory (default "+node.DefaultDataDir()+")")
	keys = keyFlags(cmd, true)
	f.StringVar(&c.Listen, "listen", "127.0.0.1:5000", "address of the registry and the API")
	f.StringVar(&c.PeerListen, "peer-listen", "", "address for the other nodes (default: the host of --listen, port "+node.PeerPort+")")
	f.StringVar(&c.Advertise, "advertise", "", "address at which the other nodes reach --peer-listen")
	f.StringVar(&c.PeerTransport, "peer-transport", "", "how to reach the other nodes: tcp, quic (UDP, the same port number) or auto, whichever gets through (default: auto, and for blobs what the setting peers.transport says)")
	f.StringVar(&c.Name, "name", "", "name of the node for people (default: the machine's)")
	f.StringToStringVar(&c.Labels, "label", nil, "where the node stands, as rack=NAME,zone=NAME: copies of a blob are kept apart by it, and fetched from near by")
	f.BoolVar(&c.Cache, "cache", false, "serve and take everything, but keep nothing for the site: what was not read for longest is let go of once other nodes keep it")
	f.StringVar(&cacheSize, "cache-size", "", "how much the blobs of --cache may take, such as 20GiB (default: what leaves a tenth of the disk free)")
	f.StringVar(&c.ExternalURL, "external-url", "", "URL at which clients find the site, when a proxy stands before it")
	f.StringVar(&c.TLS, "tls", "", "off: plain HTTP; auto: a certificate of the site's CA (default: off on a loopback address, else auto)")
	f.StringVar(&c.CertFile, "tls-cert", "", "file with a certificate (PEM) to use instead")
	f.StringVar(&c.KeyFile, "tls-key", "", "file with its key (PEM)")
	f.StringSliceVar(&c.SANs, "tls-san", nil, "further names and addresses for the certificate of --tls auto")
	f.StringVar(&storageKind, "storage", "", "where blobs are kept: local (the data directory), s3, gcs or azure (default: where they were, at first local)")
	f.StringSliceVar(&storageConfig, "storage-config", nil, "parameters of the storage, named as in distribution's storage drivers: NAME=VALUE, or a YAML file of them, which is the place for secrets")
	f.BoolVar(&c.Redirect, "redirect", false, "send clients to the object store for blobs instead of passing them through")
	f.StringVar(&logLevel, "log-level", "info", "what to log: debug, info, warn or error")
	// For tests that want a snapshot, and a log that is cut, within a minute.
	f.Int64Var(&c.Snapshots.MinBytes, "snapshot-bytes", 0, "bytes of log after which a snapshot is due (default: as suits the state)")
	f.Uint64Var(&c.Snapshots.TrailingLogs, "trailing-logs", 0, "entries of the log that stay behind a snapshot")
	for _, name := range []string{"snapshot-bytes", "trailing-logs"} {
		f.Lookup(name).Hidden = true
	}
	return cmd
}

func newLogger(cmd *cobra.Command, level string) (*slog.Logger, error) {
	l, err := telemetry.ParseLevel(level)
	if err != nil {
		return nil, usageError{err}
	}
	return telemetry.NewLogger(cmd.ErrOrStderr(), telemetry.LogOptions{Level: l})
}

// leastCache is less than any layer wants.
const leastCache = 16 << 20

func parseCacheSize(cache bool, text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	if !cache {
		return 0, usageError{errors.New("--cache-size says how large a cache is: add --cache")}
	}
	n, err := settings.ParseBytes(text)
	if err == nil && n < leastCache {
		err = fmt.Errorf("a cache has at least %s", settings.FormatBytes(leastCache))
	}
	if err != nil {
		return 0, usageError{fmt.Errorf("--cache-size %s: %w", text, err)}
	}
	return n, nil
}

func secretFile(name string) (string, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return "", usageError{err}
	}
	return strings.TrimSpace(string(data)), nil
}

// welcome tells a person where the node is and what to try.
func welcome(w io.Writer, s node.Started) {
	host := s.URL[strings.Index(s.URL, "://")+3:]
	fmt.Fprintf(w, "Atoll serves at %s (peers at %s, data in %s)\n", s.URL, s.PeerAddr, s.Data)
	if s.PasswordFile == "" {
		return
	}
	fmt.Fprintf(w, "user admin, password in %s\n\ntry next:\n", s.PasswordFile)
	fmt.Fprintf(w, "  docker login -u admin -p $(cat %s) %s\n", s.PasswordFile, host)
	fmt.Fprintf(w, "  docker tag IMAGE %s/app && docker push %s/app     # any image that you have\n", host, host)
	fmt.Fprintf(w, "  %s cluster status --data %s\n", os.Args[0], s.Data) // as it was called: it need not be in PATH
}
