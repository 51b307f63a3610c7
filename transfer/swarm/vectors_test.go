package swarm

// vectors are the infohashes of so many bytes of the tide.
var vectors = []struct {
	size     int
	infohash string
}{
	{1, "9438a385a2e57f0faa1fd43f5317b0f8f07da3af22a3b208b24427f34f6b9435"},
	{16384, "e6fe1292a190db7615f9b75a743a62e696b598ca86065a4e36796c741988c118"},
	{262144, "f9ca311c90fe6fb5e5c124eda727a1e1ec41f954e6bfaace41ac377f88eef8a2"},
	{262145, "d09ff0787e9498a5625c8be89eb6615788eb904be76b9909d9827d7c5b55a795"},
	{1 << 20, "c1489c8baa511e879be93b67fc2672ad6dde0f7481e5a76da258505e27e5005d"},
	{5505101, "24aedbd5d6a750b6bd5ef099a1b498f7a3a6b40dfe07449e20d29bbff9aa1017"},
}

// vectorPeerID is that of the node "node-a".
const vectorPeerID = "2d4154303030312d4bd978dc7b2be9e8676f7907"
