// A page of PeerJS, with the library as it comes from npm. It fetches ICE servers from Halfway, and knows Halfway's host and a
// token for its id; all else is as with any server of PeerJS. The side with `to` calls, and both exchange what
// PeerJS can carry. The result goes to the page, to the console and to `window.result`.
const flags = Object.fromEntries(new URLSearchParams(location.hash.slice(1)))
const { url = location.origin, token, id, to } = flags
const count = Number(flags.messages ?? 10)
const blob = Uint8Array.from({ length: 50_000 }, (_, place) => (place * 7) % 251)

let settle
window.result = new Promise((resolve, reject) => (settle = { resolve, reject }))
window.result.then((result) => say(`RESULT ${JSON.stringify(result)}`)).catch((error) => say(`failed: ${error.stack ?? error}`))

start().catch(settle.reject)

async function start() {
  const response = await fetch(new URL('/v1/ice', url), { headers: { authorization: `Bearer ${token}` } })
  if (!response.ok) throw new Error(`GET /v1/ice: ${response.status} ${await response.text()}`)
  const config = await response.json()
  if ('relay_only' in flags) config.iceTransportPolicy = 'relay'

  const { hostname, port } = new URL(url)
  const peer = new Peer(id, { host: hostname, port: Number(port || 443), secure: true, token, config })
  peer.on('open', () => to && exchange(peer, peer.connect(to, { reliable: true })))
  peer.on('connection', (connection) => exchange(peer, connection))
  peer.on('error', (error) => {
    // Whoever is called may come later than PeerJS waits.
    if (error.type === 'peer-unavailable') exchange(peer, peer.connect(to, { reliable: true }))
    else settle.reject(error)
  })
}

/** Each side says everything once, and has had its answer when it has heard the other's. */
function exchange(peer, connection) {
  const began = performance.now()
  const heard = []
  let opened_ms
  connection.on('open', () => {
    opened_ms = Math.round(performance.now() - began)
    for (let number = 0; number < count; number++) connection.send({ number, from: peer.id })
    connection.send(blob)
  })
  connection.on('data', async (data) => {
    if (!(data instanceof ArrayBuffer || ArrayBuffer.isView(data))) return heard.push(data)
    const numbers = heard.map(({ number }) => number)
    const in_order = numbers.every((number, place) => number === place)
    const from_peer = heard.every(({ from }) => from === connection.peer)
    const [local, remote] = await path(connection.peerConnection)
    const received = new Uint8Array(data.buffer ?? data, data.byteOffset ?? 0, data.byteLength)
    const blob_ok = received.length === blob.length && received.every((byte, place) => byte === blob[place])
    settle.resolve({ opened_ms, received: heard.length, in_order, from_peer, blob_ok, local, remote })
  })
}

/** The kinds of the candidates that were chosen. */
async function path(connection) {
  const stats = await connection.getStats()
  const all = [...stats.values()]
  // Not whichever is nominated: data may flow before. Firefox has no statistics of the transport, and marks the pair instead.
  const chosen = all.find(({ type }) => type === 'transport')?.selectedCandidatePairId
  const pair = chosen ? stats.get(chosen) : all.find(({ type, selected }) => type === 'candidate-pair' && selected)
  return [pair?.localCandidateId, pair?.remoteCandidateId].map((id) => stats.get(id)?.candidateType)
}

function say(line) {
  console.log(line)
  document.getElementById('log').append(`${line}\n`)
}
