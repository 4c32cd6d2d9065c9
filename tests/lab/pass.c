// SPDX-License-Identifier: MIT OR Apache-2.0
// For the far end of a link: a veth takes what a program sends only where there is a program, too.
__attribute__((section("xdp"), used)) int pass(void *packet)
{
	return 2; // XDP_PASS
}
