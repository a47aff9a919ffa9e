const get = id => document.getElementById(id)
const file = get('file'), drop = get('drop'), out = get('caption'), key = get('key')
let last = null, asked = 0, stop = new AbortController()

const percent = p => p < .001 ? 'less than 0.1 %' : (100*p).toFixed(1) + ' %'

function say(text, wrong) {
  out.textContent = text
  out.className = wrong ? 'wrong' : ''
}

// --- Why each word

// A word and what else could have stood there, in a line; top: nats that it loses at most
function reasons(word, top) {
  const others = word.alternatives.filter(([, p]) => p >= .001).slice(0, 3)
  const left = percent(word.probability*Math.exp(-top))
  return `“${word.text}”: ${percent(word.probability)} sure` +
    others.map(([text, p]) => `, or ${text} (${percent(p)})`).join('') + '. ' +
    (top < .1 ? 'No single part of the image decides it.' :
      `With the clear part of the image covered: ${left}.`)
}

// The grey veil over the image, but for the parts on which a word rests
function veil(heat, patches, top) {
  const rows = patches.length, columns = patches[0].length, shade = new ImageData(columns, rows)
  patches.flat().forEach((v, i) => {
    shade.data.set([115, 115, 115, 217*(1 - Math.max(0, v)/Math.max(1, top))], 4*i)
  })
  heat.width = columns
  heat.height = rows
  heat.getContext('2d').putImageData(shade, 0, 0)
}

function light(word) {
  const heat = get('heat'), top = word && Math.max(...word.patches.flat())
  heat.hidden = !word
  for (const button of get('words').children) button.setAttribute('aria-pressed', button.word == word)
  get('why').textContent = word ? reasons(word, top) :
    'Choose a word to see which region of the image supports it.'
  if (word) veil(heat, word.patches, top)
}

function wordButton(word) {
  const button = document.createElement('button')
  button.textContent = word.text
  button.word = word
  button.style.setProperty('--sure', word.probability)
  button.onmouseenter = button.onfocus = button.onclick = () => light(word)
  return button
}

function show(caption, words) {
  let at = 0
  const parts = []
  for (const word of words) {
    const start = caption.indexOf(word.text, at)
    parts.push(caption.slice(at, start))
    at = start + word.text.length
    parts.push(/[\p{L}\p{N}]/u.test(word.text) ? wordButton(word) : word.text)
  }
  get('words').replaceChildren(...parts, caption.slice(at))
  get('words').hidden = false
  out.className = 'aside'
  light(null)
}

// --- Asking for a caption

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader()
  for (let rest = ''; ;) {
    const {done, value} = await reader.read()
    if (done) return
    const parts = (rest + value).split('\n\n')
    rest = parts.pop()
    for (const part of parts) yield JSON.parse(part.slice(6))
  }
}

function tell(told) {
  if (told.words) return show(told.caption, told.words)
  // the caption has come, the reasons have not
  if (told.detail && get('picture').alt) return get('why').textContent = told.detail
  say(told.text ?? told.caption ?? told.detail, 'detail' in told)
  if (!told.caption) return
  get('picture').alt = told.caption
  out.removeAttribute('aria-busy')
  get('why').textContent = 'Finding out why …'
}

function begin(picture) {
  URL.revokeObjectURL(get('picture').src)
  get('picture').src = URL.createObjectURL(picture)
  get('picture').hidden = false
  get('picture').alt = ''
  get('hint').textContent = 'Another image: drop or choose it'
  out.setAttribute('aria-busy', 'true')
  get('words').hidden = get('heat').hidden = true
  get('why').textContent = ''
  say('…')
}

async function caption(picture) {
  if (!picture) return
  const mine = ++asked, body = new FormData()
  last = picture
  stop.abort() // nobody waits for the answer to the image before
  stop = new AbortController()
  body.append('file', picture)
  begin(picture)
  try {
    const headers = key.value ? {Authorization: 'Bearer ' + key.value} : {}
    const options = {method: 'POST', body, headers, signal: stop.signal}
    const answer = await fetch('/caption?stream=true&explain=true', options)
    if (mine != asked) return // another image was chosen meanwhile
    get('ask').hidden = answer.status != 401 && !key.value
    if (!answer.ok) say((await answer.json()).detail, true)
    else for await (const told of events(answer.body)) if (mine == asked) tell(told)
    if (answer.status == 401) key.focus()
  } catch (error) {
    if (mine == asked) say('The server does not answer: ' + error.message, true)
  }
  if (mine == asked) out.removeAttribute('aria-busy')
}

// --- What people do

file.onchange = () => caption(file.files[0])
get('ask').onsubmit = event => {
  event.preventDefault()
  caption(last)
}
get('words').onmouseleave = () => light(document.activeElement.word)
get('words').onfocusout = () => light(null)
document.ondragover = event => {
  event.preventDefault()
  drop.classList.add('over')
}
document.ondragleave = () => drop.classList.remove('over')
document.ondrop = event => {
  event.preventDefault()
  drop.classList.remove('over')
  caption(event.dataTransfer.files[0])
}
