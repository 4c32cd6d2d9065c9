// The command line of the Node examples, and the one HTTPS request they make.
import { readFileSync } from 'node:fs'
import https from 'node:https'
import { parseArgs } from 'node:util'

/** The URLs of `iceServers` that `--turn-transport` keeps. */
const TURN_URLS = { udp: /^turn:.*=udp$/, tcp: /^turn:.*=tcp$/, tls: /^turns:/ }

/** `agent URL --token T [--ca FILE] …`, and what a TLS connection to URL is made with. */
export function commandLine(extra = {}) {
  const own = { token: { type: 'string' }, ca: { type: 'string' }, 'turn-transport': { type: 'string' } }
  const options = { ...own, 'relay-only': { type: 'boolean' }, ...extra }
  const { values: flags, positionals } = parseArgs({ allowPositionals: true, options })
  const [url] = positionals
  const transport = flags['turn-transport']
  if (!url || !flags.token || (transport && !(transport in TURN_URLS))) {
    console.error('usage: agent URL --token TOKEN [--ca FILE] …; see examples/README.md')
    process.exit(2)
  }
  const tls = { ca: flags.ca && readFileSync(flags.ca), headers: { authorization: `Bearer ${flags.token}` } }
  tls.turnTransport = transport
  return { url, tls, flags, relayOnly: Boolean(flags['relay-only']) }
}

/** The flags of the agents that talk to one other. */
export const pairFlags = {
  to: { type: 'string' },
  channel: { type: 'string', default: 'ordered' },
  messages: { type: 'string', default: '10' },
  size: { type: 'string', default: '1024' },
  blob: { type: 'string', default: '0' },
}

/** The configuration for an RTCPeerConnection. */
export function fetchIce(url, tls) {
  return new Promise((resolve, reject) => {
    https.get(new URL('/v1/ice', url), tls, async (response) => {
      let body = ''
      for await (const part of response.setEncoding('utf8')) body += part
      if (response.statusCode === 200) resolve(only(tls.turnTransport, JSON.parse(body)))
      else reject(new Error(`GET /v1/ice: ${response.statusCode} ${body}`))
    }).on('error', reject)
  })
}

// Libraries that take the first URL of a relay, and no other, are told which by leaving the others out.
function only(transport, ice) {
  const wanted = TURN_URLS[transport]
  if (!wanted) return ice
  const kept = ice.iceServers.map((server) => ({ ...server, urls: server.urls.filter((url) => wanted.test(url)) }))
  return { ...ice, iceServers: kept.filter(({ urls }) => urls.length) }
}
