package main

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/node/peers"
)

func newCluster() *cobra.Command {
	return group(&cobra.Command{Use: "cluster", Short: "Look at the nodes of this site and change them"},
		newClusterStatus(), newClusterLead(), newClusterDrain(), newClusterRemove(), newClusterRecover(), newClusterSalvage(), newClusterUpgrade(),
		group(&cobra.Command{Use: "rotate", Short: "Replace certificates and keys of the site"}, newClusterRotate("certificates"), newClusterRotate("ca"), newClusterRotate("key")))
}

func newClusterStatus() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show who is up, who leads and votes, what lacks copies, and what to do",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var status peers.Status
			if err := c.call(cmd.Context(), "GET", "/api/atoll/v1/cluster", nil, &status); err != nil {
				return err
			}
			return show(cmd, status, func(w *tabwriter.Writer) { printStatus(w, status) })
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func printStatus(w *tabwriter.Writer, s peers.Status) {
	row(w, "NODE", "ADDRESS", "STATE", "ROLE", "LAG", "HEALTH", "VERSION", "LEVEL", "CERTIFICATE UNTIL")
	for _, n := range s.Nodes {
		state, role := "down", "non-voter"
		if n.Up {
			state = "up"
		}
		if n.Up && n.Suspect {
			state = "up elsewhere"
		}
		if n.Voter {
			role = "voter"
		}
		if n.Leader {
			role = "leader"
		}
		name := n.Name
		if n.ID == s.Self {
			name += " (this node)"
		}
		health := strings.Join(n.Conditions, ", ")
		switch {
		case !n.Up:
			health = "-" // what it said last may be long over
		case health == "":
			health = "well"
		}
		if n.Draining != nil {
			state += ", draining"
		}
		if n.Cache {
			role += ", cache"
		}
		expires := "-"
		if n.CertExpires != nil {
			expires = n.CertExpires.Local().Format(time.DateOnly)
		}
		row(w, name, n.Addr, state, role, n.Lag, health, cmp.Or(n.Version, "-"), n.Feature, expires)
	}
	w.Flush()
	switch {
	case s.Tolerance < 0 || !s.Quorum:
		fmt.Fprintln(w, "\nno quorum: nothing can be written now")
	case s.Tolerance == 0:
		fmt.Fprintln(w, "\nif one more voter fails, nothing can be written")
	default:
		fmt.Fprintf(w, "\n%d more voter(s) may fail\n", s.Tolerance)
	}
	if slices.ContainsFunc(s.Nodes, func(n peers.NodeStatus) bool { return n.Feature != s.Level }) {
		fmt.Fprintf(w, "feature level of the site: %d\n", s.Level)
	}
	lacking := fmt.Sprint(s.UnderReplicated)
	if s.Counting {
		lacking += " (still counting)"
	}
	fmt.Fprintf(w, "blobs: %d, lacking copies: %s, lost: %d\n", s.Blobs, lacking, s.Lost)
	if s.Surplus > 0 {
		fmt.Fprintf(w, "surplus: %d blobs, %s being released\n", s.Surplus, size(s.SurplusBytes))
	}
	if b := s.Backup; b != nil {
		fmt.Fprintf(w, "last backup: %s UTC by %s, revision %d, %s\n", b.At.UTC().Format("2006-01-02 15:04"), b.Node, b.Revision, backupHolds(b))
	}
	if s.KeyProvider != "" && s.KeyProvider != keyring.File {
		fmt.Fprintf(w, "keys of this node: sealed by %s\n", s.KeyProvider)
	}
	if s.Epoch != "0" {
		fmt.Fprintf(w, "recovery epoch: %s\n", s.Epoch)
	}
	for _, line := range s.Advice {
		fmt.Fprintln(w, line)
	}
}

// backupHolds says in words what is in a backup and who can open it.
func backupHolds(b *peers.LastBackup) string {
	holds, opens := "metadata only", "not encrypted"
	if b.Blobs {
		holds = "with blobs"
	}
	if b.Missing > 0 {
		holds += fmt.Sprintf(" (%d missing)", b.Missing)
	}
	if len(b.Recipients) > 0 {
		opens = "encrypted to " + strings.Join(b.Recipients, ", ")
	}
	return holds + ", " + opens
}

// nodePath is the API's path of a node.
func nodePath(node string) string { return "/api/atoll/v1/cluster/nodes/" + url.PathEscape(node) }

func newClusterRotate(what string) *cobra.Command {
	short, said := "Give every node a new certificate of the present CA now", "every node gets a new certificate"
	if what == "ca" {
		short = "Replace the site's CA and every certificate of it, without interruption"
		said = "a new CA is being distributed; give clients what atoll ca prints"
	}
	if what == "key" {
		short = "Replace the cluster key, which seals the site's secrets, without interruption"
		said = "a new cluster key is being made"
	}
	cmd := &cobra.Command{
		Use:   what,
		Short: short,
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var status peers.Status
			if err := c.call(cmd.Context(), "POST", "/api/atoll/v1/cluster/rotations/"+what, nil, &status); err != nil {
				return err
			}
			if status.UnderWay {
				said = "under way already: " + said
			}
			return done(cmd, status, "%s; atoll cluster status shows how far it is", said)
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func newClusterLead() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lead NODE",
		Short: "Move the leadership to a node (its name or id)",
		Args:  exactArgs("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var n peers.NodeStatus
			if err := c.call(cmd.Context(), "PUT", nodePath(args[0])+"/lead", nil, &n); err != nil {
				return err
			}
			return done(cmd, n, "%s leads the site", n.Name)
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func newClusterDrain() *cobra.Command {
	var undo bool
	cmd := &cobra.Command{
		Use:   "drain NODE",
		Short: "Take a node out of service before maintenance or removal, or back into it",
		Long: `Take a node out of service: it gives up leadership and vote as soon as others can
take them, and its blobs are copied to others. It goes on serving. atoll cluster
status shows how far it is; when it is drained, it can be stopped or removed.`,
		Args: exactArgs("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			method, said := "PUT", "%s is being drained; atoll cluster status shows how far it is"
			if undo {
				method, said = "DELETE", "%s is in service"
			}
			var n peers.NodeStatus
			if err := c.call(cmd.Context(), method, nodePath(args[0])+"/drain", nil, &n); err != nil {
				return err
			}
			return done(cmd, n, said, n.Name)
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().BoolVar(&undo, "undo", false, "take the node back into service")
	return cmd
}

func newClusterRemove() *cobra.Command {
	var force, stolen bool
	cmd := &cobra.Command{
		Use:   "remove NODE",
		Short: "Take a node out of the site for good (its name or id)",
		Long: `Take a node out of the site for good. It is refused when too few voters would stay
to decide anything, and, without --force, when the node holds the only copy of a
blob. The node stops by itself if it still runs.`,
		Args: exactArgs("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			path := nodePath(args[0])
			switch {
			case stolen:
				path += "?stolen=true"
			case force:
				path += "?force=true"
			}
			var left peers.Left
			if err := c.call(cmd.Context(), "DELETE", path, nil, &left); err != nil {
				return err
			}
			said := "%s (%s) is no longer a node of this site"
			switch {
			case stolen:
				said += "; its tokens are void, the CA and the cluster key are being replaced (atoll cluster status); now change the passwords that were used on it"
			case left.Before:
				said = "%s (%s) was removed before"
			}
			return done(cmd, left, said, left.Name, left.ID)
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "give up blobs of which the node holds, or may hold, the only copy")
	cmd.Flags().BoolVar(&stolen, "stolen", false, "the node may be in strange hands: remove it at once, whatever blobs go with it, and replace all keys that it held")
	return cmd
}
