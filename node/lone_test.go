package node

import "testing"

// TestLoneNodeWithoutAVote: a cache, which never has the cluster key, logs clients in
// and serves pulls with everything else dead, also after a restart.
func TestLoneNodeWithoutAVote(t *testing.T) {
	first := start(t, config(t))
	lone := join(t, first, "lone", func(c *Config) { c.Cache = true })
	p := first.push("library/app", "v1", content(71, 300<<10))
	lone.pull(p, "v1") // which leaves it there
	var elsewhere struct{ Token string }
	const scope = "/service/token?service=harbor-registry&scope=repository:library/app:pull"
	first.do("GET", scope, nil).want(200).decode(&elsewhere)
	if len(lone.member.ClusterKeys()) != 0 {
		t.Error("it has the cluster key")
	}
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		var own struct{ Token string }
		lone.do("GET", scope, nil).want(200).decode(&own)
		for name, token := range map[string]string{"its own": own.Token, "the dead node's": elsewhere.Token} {
			a := lone.as(login{}, "GET", "/v2/library/app/manifests/v1", nil, "Authorization", "Bearer "+token)
			if a.Status != 200 {
				t.Errorf("%s token: %d %s", name, a.Status, a.Body)
			}
		}
		lone.pull(p, "v1")
		lone = lone.again()
	}
}
